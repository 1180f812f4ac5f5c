"""Every error that a person can meet, each with a code that never changes.

    BabyLlamaError
    ├── UsageError       E1xx   a flag or a setting is wrong                      exit status 2
    ├── InputError       E2xx   a model or checkpoint on disk is wrong            exit status 3
    │                    E3xx   a text, prepared data or a tokenizer is wrong
    ├── MachineError     E4xx   disk, memory, permission, lock or network         exit status 4
    └── NumericalError   E5xx   numbers stopped being numbers                     exit status 5

E901 is a defect of Baby Llama itself, exit status 1. Exit statuses 129, 130 (Ctrl-C) and 143 mean: stopped by a signal;
a training run has saved its state.

An error says where it happened, what was found and what was expected, and one remedy:

    error[E204]: runs/tales/step-00000400/model.safetensors: sha256 differs from manifest.json (file damaged)
      Fix: resume from step-00000350, the newest intact step:  babyllama train --resume runs/tales --step 350
"""

CODES = {
    "E101": "unknown setting, name or choice",
    "E102": "value out of range",
    "E103": "settings that exclude each other, or one that is missing",
    "E104": "a resumed run was asked for other settings than it was started with",
    "E105": "a format has no place for something of this model",
    "E201": "nothing at this path can be opened as a model",
    "E202": "config.json is not the configuration of a Llama",
    "E203": "tensors are missing, unexpected or of the wrong shape",
    "E204": "contents differ from their sha256 in manifest.json",
    "E205": "a file is missing, cut short or too long, or its disk fails",
    "E206": "manifest.json, run.json or state.json cannot be used",
    "E207": "a run has no intact saved step",
    "E208": "written by a newer version of Baby Llama",
    "E209": "not a llama2.c file that this version reads",
    "E210": "not a GGUF file that this version reads",
    "E211": "weights that are not finite",
    "E212": "not a file of Meta's that this version reads",
    "E301": "no text was found",
    "E302": "text is not valid in its encoding",
    "E303": "too little text for the context or the validation split",
    "E304": "vocabulary size does not suit the text",
    "E305": "file cannot be read as text",
    "E306": "a jsonl or parquet file lacks the text field, or a line of it is broken",
    "E307": "prepared data is damaged or was changed",
    "E308": "no named text of this name",
    "E309": "token ids do not belong to this tokenizer",
    "E310": "tokenizer file cannot be read",
    "E311": "prompt is longer than the context",
    "E312": "a chat template cannot be used, or refuses a conversation",
    "E401": "no space left on the disk",
    "E402": "folder is in use by another run",
    "E403": "folder or file cannot be written or read",
    "E404": "not enough memory",
    "E405": "something could not be downloaded",
    "E406": "an optional library is missing, or does not start",
    "E407": "a downloaded package is not the pinned one",
    "E501": "loss or gradients are not finite",
    "E502": "the model produced logits that are not finite",
    "E503": "a device computes wrong numbers",
    "E504": "what was written does not compute the same when it is read again",
    "E901": "a defect of Baby Llama",
}


LONGEST_FOUND = 3000  # letters; what stands in a file may be longer


def _printable(found: str) -> str:
    """Without what could write on a terminal, or fill it: control characters escaped, no more than both ends."""
    if len(found) > LONGEST_FOUND:
        found = f"{found[: LONGEST_FOUND // 2]} ... {found[-LONGEST_FOUND // 2 :]}"
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in found
    )


class BabyLlamaError(Exception):
    """`where` names the file, folder or flag; `found` what was found and expected; `fix` one remedy."""

    prefixes: tuple[str, ...] = ("E",)
    exit_status = 1

    def __init__(self, code: str, where: object, found: str, fix: str) -> None:
        assert code in CODES and code.startswith(self.prefixes), code
        super().__init__(code, where, found, fix)
        self.code, self.where, self.found, self.fix = code, str(where), _printable(found), fix

    def __str__(self) -> str:
        return f"error[{self.code}]: {self.where}: {self.found}\n  Fix: {self.fix}"


class UsageError(BabyLlamaError, ValueError):
    prefixes = ("E1",)
    exit_status = 2


class InputError(BabyLlamaError, ValueError):
    prefixes = ("E2", "E3")
    exit_status = 3


class MachineError(BabyLlamaError):
    prefixes = ("E4",)
    exit_status = 4


class NumericalError(BabyLlamaError, ArithmeticError):
    prefixes = ("E5",)
    exit_status = 5
