"""Prepared data: a split without leaks, nothing lost, nothing half written, nothing trusted unread."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama.checkpoint import folder as folders
from babyllama.checkpoint.folder import read_sealed, sealed, write_folder
from babyllama.data import corpus as corpus_module
from babyllama.data import documents
from babyllama.data.corpus import Corpus, default_vocab_size, prepare
from babyllama.errors import BabyLlamaError, MachineError
from babyllama.text.tokenizer import SPECIALS, Tokenizer

WORDS = [
    "the",
    "a",
    "girl",
    "king",
    "sea",
    "house",
    "ship",
    "little",
    "old",
    "went",
    "said",
    "and",
    "once",
    "of",
    "to",
]


def _tale(seed: int, words: int = 120) -> str:
    draw = random.Random(seed)
    return f"TALE {seed}\n\n" + " ".join(draw.choice(WORDS) for _ in range(words)) + ".\n"


def _folder(tmp_path: Path, tales: list[str], name: str = "tales") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    for number, tale in enumerate(tales):
        (folder / f"{number:03}.txt").write_text(tale, encoding="utf-8")
    return folder


def _documents(corpus: Corpus, side: str) -> list[str]:
    """The texts of one side, read back from the ids."""
    ids = getattr(corpus, f"{side}_ids").astype(np.int64)
    starts = np.flatnonzero(ids == corpus.tokenizer.bos_id)
    ends = np.flatnonzero(ids == corpus.tokenizer.eos_id)
    assert len(starts) == len(ends)
    assert (starts[1:] == ends[:-1] + 1).all()
    assert (starts[0], ends[-1]) == (0, len(ids) - 1)
    return [corpus.tokenizer.decode(ids[a + 1 : b].tolist()) for a, b in zip(starts, ends, strict=True)]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _raises(code: str, call) -> BabyLlamaError:
    with pytest.raises(BabyLlamaError) as error:
        call()
    assert error.value.code == code, str(error.value)
    assert error.value.fix
    return error.value


@pytest.fixture(scope="module")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """60 tales, prepared."""
    folder = tmp_path_factory.mktemp("module")
    return prepare(_folder(folder, [_tale(n) for n in range(60)]), folder / "out")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A small prepared folder that a test may damage."""
    source = _folder(tmp_path, [_tale(n) for n in range(30)], "source of made")
    return prepare(source, tmp_path / "made").folder


# The split.


def test_documents_of_validation_never_occur_in_training(tales: Corpus) -> None:
    training, validation = _documents(tales, "train"), _documents(tales, "val")
    assert validation
    assert not set(training) & set(validation)
    assert not any(held_out in "".join(training) for held_out in validation)


def test_every_document_is_on_one_side_whole_with_its_ends(tales: Corpus) -> None:
    sides = [_documents(tales, "train"), _documents(tales, "val")]
    assert sorted(sides[0] + sides[1]) == sorted(_tale(n) for n in range(60))
    assert [tales.train_documents, tales.val_documents] == [len(side) for side in sides]
    assert [tales.train_bytes, tales.val_bytes] == [
        sum(len(text.encode()) for text in side) for side in sides
    ]


def test_validation_has_its_share_of_the_bytes(tales: Corpus) -> None:
    share = tales.val_bytes / (tales.val_bytes + tales.train_bytes)
    assert 0.04 < share < 0.08


def test_the_split_does_not_depend_on_names_or_order(tales: Corpus, tmp_path: Path) -> None:
    order = list(range(60))
    random.Random(0).shuffle(order)
    again = prepare(_folder(tmp_path, [_tale(n) for n in order]), tmp_path / "out")
    assert set(_documents(again, "val")) == set(_documents(tales, "val"))
    assert again.tokenizer.sha256 == tales.tokenizer.sha256
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": _tale(n)}) + "\n" for n in reversed(order)), encoding="utf-8")
    assert set(_documents(prepare(rows, tmp_path / "rows"), "val")) == set(_documents(tales, "val"))


def test_the_split_is_stable_and_another_seed_gives_another(tales: Corpus, tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(60)])
    again = prepare(source, tmp_path / "again")
    assert again.fingerprint == tales.fingerprint
    other = prepare(source, tmp_path / "other", seed=1)
    assert set(_documents(other, "val")) != set(_documents(tales, "val"))
    assert other.fingerprint != tales.fingerprint


def test_a_new_document_moves_few_others_to_the_other_side(tales: Corpus, tmp_path: Path) -> None:
    more = prepare(_folder(tmp_path, [_tale(n) for n in range(61)]), tmp_path / "out")
    assert len(set(_documents(more, "val")) ^ set(_documents(tales, "val"))) <= 2


def test_exact_duplicates_are_removed(tmp_path: Path) -> None:
    corpus = prepare(_folder(tmp_path, [_tale(n % 20) for n in range(50)]), tmp_path / "out")
    texts = _documents(corpus, "train") + _documents(corpus, "val")
    assert sorted(texts) == sorted(_tale(n) for n in range(20))
    assert corpus.duplicates == 30


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=60), st.floats(0.01, 0.5))
def test_both_sides_have_something_and_validation_about_its_share(sizes: list[int], fraction: float) -> None:
    keys = {hashlib.sha256(bytes([n])).digest(): size for n, size in enumerate(sizes)}
    chosen = corpus_module._choose(keys, fraction)
    if chosen is not None:
        assert 0 < len(chosen) < len(keys)
        share = sum(keys[key] for key in chosen) / sum(sizes)
        assert 0.5 * fraction <= share * (1 + 1e-9)
        assert share <= 2 * fraction * (1 + 1e-9)
    loose = corpus_module._choose(keys, fraction, strict=False)
    assert loose is not None
    assert 0 < len(loose) < len(keys)


@pytest.mark.parametrize("end", ["\n\n", "\n", " ", ""], ids=["paragraphs", "lines", "words", "nothing"])
def test_one_document_is_cut_so_that_both_sides_exist(tmp_path: Path, end: str) -> None:
    file = tmp_path / "one.txt"
    text = end.join("".join(random.Random(n).choices("abcdefgh", k=50)) for n in range(200))
    file.write_text(text, encoding="utf-8")
    corpus = prepare(file, tmp_path / "out")
    texts = _documents(corpus, "train") + _documents(corpus, "val")
    assert sorted("".join(texts)) == sorted(text)  # nothing lost
    assert all(piece in text for piece in texts)
    assert 0.03 < corpus.val_bytes / len(text) < 0.1
    if end:
        assert all(piece.endswith(end) or text.endswith(piece) for piece in texts)


def test_three_documents_are_cut_rather_than_a_third_held_out(tmp_path: Path) -> None:
    corpus = prepare(_folder(tmp_path, [_tale(n, 5000) for n in range(3)]), tmp_path / "out")
    assert corpus.val_bytes < 0.1 * (corpus.train_bytes + corpus.val_bytes)


@pytest.mark.parametrize("text", ["ab", "日本", "a b\n"])
def test_two_characters_are_enough(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tiny.txt"
    file.write_text(text, encoding="utf-8")
    corpus = prepare(file, tmp_path / "out")
    assert min(corpus.train_documents, corpus.val_documents) >= 1
    assert len(set("".join(_documents(corpus, "train") + _documents(corpus, "val")))) >= 2


@pytest.mark.parametrize("text", ["a", "ab" * 256])
def test_text_that_cannot_be_split_is_e303(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tiny.txt"
    file.write_text(text, encoding="utf-8")
    error = _raises("E303", lambda: prepare(file, tmp_path / "out"))
    assert "have 1" in error.found
    assert "need 2" in error.found


# The vocabulary.


def test_the_tokenizer_never_saw_the_validation_side(tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(40)])
    first = prepare(source, tmp_path / "first")
    train = [tale for tale in map(_tale, range(40)) if tale not in _documents(first, "val")]
    assert first.tokenizer.sha256 == Tokenizer.train(train, 320, exact=False).sha256
    everything = Tokenizer.train(map(_tale, range(40)), 320, exact=False)
    assert first.tokenizer.sha256 != everything.sha256


def test_the_vocabulary_follows_the_size_of_the_text() -> None:
    sizes = [
        default_vocab_size(n) for n in (0, 10_000, 400_000, 1_000_000, 1_900_000, 4_900_000, 10**7, 10**9)
    ]
    assert sizes == [320, 320, 384, 1024, 2048, 2048, 8192, 16384]
    many = [default_vocab_size(n) for n in range(0, 30_000_000, 10_000)]
    assert many == sorted(many)


def test_the_default_vocabulary_never_fails_but_an_explicit_one_can(tmp_path: Path) -> None:
    source = _folder(tmp_path, ["ab", "cd", "ef"])
    assert prepare(source, tmp_path / "out").vocab_size == 256 + len(SPECIALS)
    for size in (0, 260, 400):
        _raises("E304", lambda size=size: prepare(source, tmp_path / "explicit", vocab_size=size))
    assert not (tmp_path / "explicit").exists()


def test_an_explicit_vocabulary_is_used(tmp_path: Path) -> None:
    corpus = prepare(_folder(tmp_path, [_tale(n) for n in range(40)]), tmp_path / "out", vocab_size=300)
    assert corpus.vocab_size == corpus.tokenizer.vocab_size == 300


def test_a_given_tokenizer_is_used_and_kept(tales: Corpus, tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(100, 140)])
    corpus = prepare(source, tmp_path / "out", tokenizer=tales.tokenizer)
    assert corpus.tokenizer.files() == tales.tokenizer.files()
    assert all((corpus.folder / name).read_bytes() == data for name, data in tales.tokenizer.files().items())
    _raises("E103", lambda: prepare(source, tmp_path / "both", tokenizer=tales.tokenizer, vocab_size=300))


def test_bos_and_eos_are_those_of_the_tokenizer(tales: Corpus, tmp_path: Path) -> None:
    files = tales.tokenizer.files()
    names = {**json.loads(files["tokenizer_config.json"]), "bos_token": "<|start_header_id|>"}
    ends = {"generation_config.json": b'{"bos_token_id": 2, "eos_token_id": [4, 1]}'}
    tokenizer = Tokenizer({**files, **ends, "tokenizer_config.json": json.dumps(names).encode()})
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 4)
    corpus = prepare(_folder(tmp_path, [_tale(n) for n in range(30)]), tmp_path / "out", tokenizer=tokenizer)
    assert len(_documents(corpus, "train")) == corpus.train_documents  # it looks for these two ids
    assert (corpus.tokenizer.bos_id, corpus.tokenizer.eos_id, corpus.tokenizer.eos_ids) == (
        2,
        4,
        frozenset({1, 4}),
    )
    assert not np.isin(corpus.train_ids, [0, 1]).any()


def test_control_tokens_written_in_the_text_stay_text(tmp_path: Path) -> None:
    tales = [_tale(n) + "<|end_of_text|><|eot_id|>" for n in range(30)]
    corpus = prepare(_folder(tmp_path, tales), tmp_path / "out")
    assert sorted(_documents(corpus, "train") + _documents(corpus, "val")) == sorted(tales)
    specials = np.isin(corpus.train_ids, list(corpus.tokenizer.special_ids))
    assert specials.sum() == 2 * corpus.train_documents  # BOS and EOS of each, nothing else


def _packed(vocab_size: int, ids: list[int]) -> bytes:
    """What would be written for one document, with a tokenizer of any size."""
    tokenizer = object.__new__(Tokenizer)
    tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id = vocab_size, 0, 1
    return corpus_module._pack([ids], tokenizer)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_535, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (2**20, "<u4")]
)
def test_the_largest_id_survives_and_the_width_follows_the_vocabulary(vocab_size: int, dtype: str) -> None:
    ids = [5, vocab_size - 1, 65_534]
    assert np.frombuffer(_packed(vocab_size, ids), dtype).tolist() == [0, *ids, 1]


@pytest.mark.parametrize(("vocab_size", "id"), [(65_536, 65_536), (65_536, -1), (2**20, 2**32)])
def test_an_id_that_does_not_fit_is_never_wrapped_around(vocab_size: int, id: int) -> None:
    with pytest.raises(AssertionError):
        _packed(vocab_size, [id])


# Text that is none.


def test_no_text_is_e301(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n\t\n", encoding="utf-8")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": " "}\n', encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "only pictures").mkdir()
    (tmp_path / "only pictures" / "a.png").write_bytes(b"\x89PNG")
    for name in ("empty.txt", "blank.txt", "blank.jsonl", "folder", "only pictures"):
        _raises("E301", lambda name=name: prepare(tmp_path / name, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_name_is_e308_and_names_the_nearest(tmp_path: Path) -> None:
    error = _raises("E308", lambda: prepare("fairytales", tmp_path / "out"))
    assert error.fix.endswith("fairy-tales")
    _raises("E308", lambda: prepare(tmp_path / "no such file.txt", tmp_path / "out"))


def test_bad_bytes_are_e302_and_can_be_replaced(tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(30)])
    (source / "bad.txt").write_bytes(b"good\nca\xff\xfe")
    error = _raises("E302", lambda: prepare(source, tmp_path / "out"))
    assert error.where.endswith("bad.txt:2")
    assert not (tmp_path / "out").exists()
    assert prepare(source, tmp_path / "out", on_bad_text="replace").characters_replaced == 2


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.51, 1.0, float("nan")])
def test_a_share_outside_its_range_is_e102(tmp_path: Path, fraction: float) -> None:
    _raises("E102", lambda: prepare(tmp_path, tmp_path / "out", val_fraction=fraction))


@pytest.mark.parametrize("text", ["something else", ""])
def test_a_source_that_changes_meanwhile_is_e307(tmp_path: Path, text: str) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(30)])

    def meddle(stage: str, done: int, total: int) -> None:
        if stage == "tokenizer":
            (source / "005.txt").write_text(text, encoding="utf-8")

    _raises("E307", lambda: prepare(source, tmp_path / "out", progress=meddle))
    assert list(tmp_path.iterdir()) == [source]


# The folder appears whole or not at all.


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}

    def report(stage: str, done: int, total: int) -> None:
        assert done >= last.get(stage, (0, 0))[0]
        last[stage] = (done, total)

    corpus = prepare(_folder(tmp_path, [_tale(n) for n in range(30)]), tmp_path / "out", progress=report)
    size = corpus.train_bytes + corpus.val_bytes
    assert last == {"reading": (size, size), "tokenizer": (size, size), "encoding": (size, size)}


def test_existing_data_is_e403_unless_overwritten(made: Path, tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(100, 130)])
    before = Corpus.open(made).fingerprint
    error = _raises("E403", lambda: prepare(source, made))
    assert "--overwrite" in error.fix
    assert Corpus.open(made).fingerprint == before
    assert prepare(source, made, overwrite=True).fingerprint != before
    assert _names(tmp_path) == ["made", "source of made", "tales"]


def test_what_is_no_prepared_data_is_never_overwritten(tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(30)])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine", encoding="utf-8")
    for out in (precious, precious / "thesis.txt"):
        _raises("E403", lambda out=out: prepare(source, out, overwrite=True))
    assert (precious / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(_folder(tmp_path, [_tale(n) for n in range(30)]), tmp_path / "out")


def test_what_appears_at_the_last_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(30)])
    out = tmp_path / "out"
    looks: list[bool] = []

    def looked(out: Path, overwrite: bool) -> bool:
        looks.append(taken(out, overwrite))
        if len(looks) == 2:  # the last look, and only now somebody comes
            out.mkdir()
            (out / "thesis.txt").write_text("mine", encoding="utf-8")
        return looks[-1]

    taken = corpus_module._taken
    monkeypatch.setattr(corpus_module, "_taken", looked)
    _raises("E403", lambda: prepare(source, out, overwrite=True))
    assert looks == [False, False]
    assert _names(out) == ["thesis.txt"]
    assert _names(tmp_path) == ["out", "tales"]


@pytest.mark.parametrize("stage", ["reading", "tokenizer", "encoding"])
def test_of_two_preparations_at_once_one_wins_whole(tmp_path: Path, stage: str) -> None:
    first = _folder(tmp_path, [_tale(n) for n in range(30)], "first")
    second = _folder(tmp_path, [_tale(n) for n in range(100, 130)], "second")
    out = tmp_path / "out"
    second_won = stage != "encoding"  # by then the first one writes, and holds the place
    outcomes: list[object] = []

    def overtake(now: str, done: int, total: int) -> None:
        if now == stage and not outcomes:
            outcomes.append("begun")
            if second_won:
                outcomes.append(prepare(second, out).fingerprint)
            else:
                outcomes.append(_raises("E403", lambda: prepare(second, out)).found)

    if second_won:
        _raises("E403", lambda: prepare(first, out, progress=overtake))
        assert Corpus.open(out).fingerprint == outcomes[1]
    else:
        prepare(first, out, progress=overtake)
        assert "another preparation" in str(outcomes[1])
        assert set(_documents(Corpus.open(out), "val")) < {_tale(n) for n in range(30)}
    assert _names(tmp_path) == ["first", "out", "second"]


# Nothing of the user's is ever removed.


@pytest.mark.parametrize("name", ["thesis.txt", ".notes", "sub/deep.txt", "corpus.json"])
def test_prepared_data_with_a_file_of_the_user_are_never_overwritten(made: Path, name: str) -> None:
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_text("mine", encoding="utf-8")
    source = _folder(made.parent, [_tale(n) for n in range(100, 130)])
    before = Corpus.open(made).fingerprint
    error = _raises("E403", lambda: prepare(source, made, overwrite=True))
    assert name.partition("/")[0] in error.found
    assert (made / name).read_text(encoding="utf-8") == "mine"
    assert Corpus.open(made).fingerprint == before


def test_files_that_merely_have_the_names_of_prepared_data_are_never_overwritten(made: Path) -> None:
    (made / "manifest.json").write_text('{"kind": "data", "files": {"train.bin": {}}}', encoding="utf-8")
    before = _names(made)
    _raises("E403", lambda: prepare(made.parent / "source of made", made, overwrite=True))
    (made / "manifest.json").unlink()
    _raises("E403", lambda: prepare(made.parent / "source of made", made, overwrite=True))
    assert _names(made) == [name for name in before if name != "manifest.json"]


def test_a_file_that_comes_while_data_are_replaced_stays(made: Path) -> None:
    source = _folder(made.parent, [_tale(n) for n in range(100, 130)])
    rename = Path.rename

    def put_something_in(self: Path, target: Path) -> Path:
        if self == made:
            (made / "thesis.txt").write_text("mine", encoding="utf-8")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", put_something_in)
        prepare(source, made, overwrite=True)
    assert "TALE 1" in "".join(_documents(Corpus.open(made), "train"))
    assert _names(made.with_name(".del-made")) == ["thesis.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_text_is_never_written_over_by_its_own_ids(made: Path, overwrite: bool) -> None:
    (made / "book.txt").write_text("mine", encoding="utf-8")
    (made.parent / "link").symlink_to(made)
    for source in (made, made / "book.txt", made / ".." / "made", made.parent / "link"):
        with pytest.raises(BabyLlamaError) as error:
            prepare(source, made, overwrite=overwrite)
        assert error.value.code in ("E103", "E403")
    (made / "book.txt").unlink()
    new = made.parent / "new"
    new.mkdir()
    _raises("E103", lambda: prepare(made, made, overwrite=True))
    _raises("E103", lambda: prepare(new, new))
    assert len(Corpus.open(made).train_ids) > 0


def test_data_prepared_inside_their_source_are_no_part_of_it(tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(30)])
    first = prepare(source, source / "runs" / "data")
    again = prepare(source, source / "runs" / "data", overwrite=True)
    assert again.fingerprint == first.fingerprint
    assert again.skipped == {"prepared data": 1}


def test_a_link_to_prepared_data_stays_one(made: Path) -> None:
    link = made.parent / "link"
    link.symlink_to(made)
    source = _folder(made.parent, [_tale(n) for n in range(100, 130)])
    prepare(source, link, overwrite=True)
    assert link.is_symlink()
    assert "TALE 1" in "".join(_documents(Corpus.open(made), "train"))


@pytest.mark.parametrize("source", ["shakespeare", "hub:tales"])
def test_a_name_that_means_two_things_is_e103(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _folder(tmp_path, [_tale(n) for n in range(30)], source)
    error = _raises("E103", lambda: prepare(source, "out"))
    assert error.fix.endswith(f"  ./{source}")
    assert prepare(f"./{source}", "out").train_documents > 20
    assert prepare(Path(source), "out2").train_documents > 20


# Killed.


PROGRAM = """
import os, resource, signal, sys
from babyllama.data.corpus import prepare
from babyllama.errors import BabyLlamaError
source, out, how = sys.argv[1:]
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
def report(stage, done, total):
    if stage == how and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
try:
    prepare(source, out, progress=report)
except BabyLlamaError as error:
    print(error.code, error.where)
"""

# Forks, and each child dies by SIGKILL at another call of the file system: at its first, its second ...
KILLED = """
import os, pathlib, signal, sys
from babyllama.checkpoint.folder import verify_folder
from babyllama.data.corpus import prepare
source, out = sys.argv[1], pathlib.Path(sys.argv[2])
WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}
overwrite = out.exists()

def die_at(call):
    calls = 0
    def watch(event, arguments):
        nonlocal calls
        if event in WATCHED and str(arguments[0]).startswith(str(out.parent)):
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

call, status = 0, 1
while status:
    call += 1
    child = os.fork()
    if not child:
        die_at(call)
        prepare(source, out, overwrite=overwrite)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    if out.exists():
        verify_folder(out)
    if out.exists() and not overwrite:
        break
print(call)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and limits are POSIX")
@pytest.mark.parametrize("stage", ["reading", "encoding"])
def test_a_killed_preparation_leaves_nothing_that_could_be_used(tmp_path: Path, stage: str) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(30)])
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(source), str(out), stage], capture_output=True)
    assert done.returncode == -9
    assert not out.exists()
    _raises("E307", lambda: Corpus.open(out))
    assert prepare(source, out).train_documents > 20
    assert _names(tmp_path) == ["out", "tales"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwritten"])
def test_killed_at_any_call_the_folder_is_whole_or_not_there_and_the_command_works_again(
    tmp_path: Path, overwrite: bool
) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    source, out = _folder(tmp_path, [_tale(n, 20) for n in range(6)]), folder / "out"
    if overwrite:
        prepare(_folder(tmp_path, [_tale(n) for n in range(100, 130)], "old"), out)
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
    corpus = prepare(source, out, overwrite=True)
    assert sum(len(_documents(corpus, side)) for side in ("train", "val")) >= 6
    assert _names(folder) == ["out"]


def test_data_that_were_being_replaced_come_back(made: Path) -> None:
    before = Corpus.open(made).fingerprint
    made.rename(made.with_name(".del-made"))  # killed here
    _raises("E403", lambda: prepare(made.parent / "source of made", made))
    assert Corpus.open(made).fingerprint == before
    assert _names(made.parent) == ["made", "source of made"]


def test_data_that_cannot_be_replaced_stay(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        assert not made.exists()  # they have been set aside already
        raise OSError(28, "No space left on device")

    before = Corpus.open(made).fingerprint
    source = _folder(made.parent, [_tale(n) for n in range(100, 130)])
    monkeypatch.setattr(folders.os, "fsync", full)
    _raises("E401", lambda: prepare(source, made, overwrite=True))
    assert Corpus.open(made).fingerprint == before
    assert _names(made.parent) == ["made", "source of made", "tales"]


def test_only_left_overs_of_this_very_folder_are_swept(tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(30)])
    ours = [".tmp-out-123", ".tmp-out-4567"]
    others = [".tmp-out-5-123", ".tmp-out", ".tmp-out-mine", ".tmp-outer-123", ".del-out-5", "tmp-out-1"]
    for name in ours + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.bin").write_bytes(b"half")
    prepare(source, tmp_path / "out")
    assert _names(tmp_path) == sorted([*others, "out", "tales"])


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX")
def test_a_full_disk_is_e401_and_leaves_nothing(tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n, 1000) for n in range(30)])
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "out"), "full"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("E401 "), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tales"]


def test_a_folder_that_cannot_be_made_is_e403(tmp_path: Path) -> None:
    source = _folder(tmp_path, [_tale(n) for n in range(30)])
    (tmp_path / "file").touch()
    _raises("E403", lambda: prepare(source, tmp_path / "file" / "out"))


# Opening it again.


def test_ids_are_mapped_read_only(made: Path) -> None:
    corpus = Corpus.open(made)
    for ids in (corpus.train_ids, corpus.val_ids):
        assert isinstance(ids, np.memmap)
        assert ids.dtype == np.dtype("<u2")
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1


FILES = ["train.bin", "val.bin", "tokenizer.json", "tokenizer_config.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped bit", "cut", "longer", "empty", "missing"])
def test_a_damaged_file_is_e307(made: Path, name: str, damage: str) -> None:
    path = made / name
    data = path.read_bytes()
    middle = len(data) // 2
    changed = {
        "flipped bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "cut": data[:-1],
        "longer": data + b"\0",
        "empty": b"",
    }
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    error = _raises("E307", lambda: Corpus.open(made))
    # What it proposes can be done: with a damaged manifest nobody knows which files may be replaced.
    if "--overwrite" in error.fix:
        prepare(made.parent / "source of made", made, overwrite=True)
    else:
        assert name == "manifest.json"
        _raises("E403", lambda: prepare(made.parent / "source of made", made, overwrite=True))


def _seal(folder: Path, **changes: object) -> None:
    """Change the manifest or the files beside it so that sizes and hashes agree again: a forgery, or a bug."""
    manifest = read_sealed(folder / "manifest.json") | changes
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_bytes(sealed(manifest))


def test_an_id_outside_the_vocabulary_is_e309_and_says_where(made: Path) -> None:
    vocab_size = Corpus.open(made).vocab_size
    ids = np.fromfile(made / "val.bin", "<u2")
    ids[7] = vocab_size
    ids.tofile(made / "val.bin")
    _seal(made)
    error = _raises("E309", lambda: Corpus.open(made))
    assert error.where.endswith("val.bin")
    assert f"id {vocab_size} at index 7 " in error.found


def test_another_tokenizer_in_the_folder_is_e309(made: Path) -> None:
    (made / "tokenizer.json").write_bytes(Tokenizer.train([], 5000, exact=False).files()["tokenizer.json"])
    _seal(made)
    _raises("E309", lambda: Corpus.open(made))


def test_a_file_that_cannot_hold_ids_is_e307(made: Path) -> None:
    for data in (b"", b"\1\0\1"):
        (made / "train.bin").write_bytes(data)
        _seal(made)
        _raises("E307", lambda: Corpus.open(made))


def test_a_newer_format_is_e208(made: Path) -> None:
    _seal(made, format=2)
    _raises("E208", lambda: Corpus.open(made))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"kind": "data"}', "{}", "[" * 100_000, "\xff", '{"kind": "data"' * 9]
)
def test_a_manifest_that_is_none_is_e307(made: Path, text: str) -> None:
    (made / "manifest.json").write_text(text, encoding="latin-1")
    _raises("E307", lambda: Corpus.open(made))


def test_a_manifest_that_says_too_little_is_e307(made: Path) -> None:
    manifest = read_sealed(made / "manifest.json")
    for key in (*corpus_module.TOLD, "kind", "format", "files"):
        (made / "manifest.json").write_bytes(sealed({k: v for k, v in manifest.items() if k != key}))
        _raises("E307", lambda: Corpus.open(made))


def test_a_number_changed_in_the_manifest_is_e307(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_bytes())
    for key, value in manifest.items():
        changed = {**manifest, key: {**value, "documents": 1} if isinstance(value, dict) else 0}
        if changed != manifest:
            (made / "manifest.json").write_text(json.dumps(changed, indent=1), encoding="utf-8")
            _raises("E307", lambda: Corpus.open(made))


def test_nothing_prepared_is_e307(tmp_path: Path) -> None:
    for folder in (tmp_path / "empty", tmp_path / "missing", tmp_path):  # the last one holds something
        (tmp_path / "empty").mkdir(exist_ok=True)
        error = _raises("E307", lambda folder=folder: Corpus.open(folder))
        assert ("--overwrite" in error.fix) is (folder != tmp_path)
        assert "babyllama data TEXT --out " in error.fix


def test_prepared_data_are_told_from_a_saved_step_and_from_a_folder_of_the_user(made: Path) -> None:
    assert Corpus.stands_in(made)
    assert Corpus.stands_in(str(made))
    (made / "train.bin").unlink()
    assert Corpus.stands_in(made)  # damaged, which opening says
    step, mine = made.parent / "step", made.parent / "mine"
    write_folder(step, {"model.safetensors": b""}, {"step": 7})
    mine.mkdir()
    (mine / "manifest.json").write_text('{"name": "an extension of a browser"}', encoding="utf-8")
    (mine / "corpus.json").write_text("{}", encoding="utf-8")
    for folder in (step, mine, made / "val.bin", made.parent / "missing"):
        assert not Corpus.stands_in(folder)
        _raises("E307", lambda folder=folder: Corpus.open(folder))


def test_a_folder_with_spaces_is_quoted_in_the_remedy(made: Path) -> None:
    folder = made.rename(made.with_name("made of tales"))
    (folder / "val.bin").unlink()
    assert f"--out '{folder}' --overwrite" in _raises("E307", lambda: Corpus.open(folder)).fix


def test_a_corpus_can_be_moved(made: Path, tmp_path: Path) -> None:
    before = Corpus.open(made).fingerprint
    made.rename(tmp_path / "moved")
    assert Corpus.open(tmp_path / "moved").fingerprint == before


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A line of 24 MB and no end: what is held at a time stays a few chunks."""
    import tracemalloc

    file = tmp_path / "line.txt"
    file.write_text("".join(f"word{n} " for n in range(2_200_000)), encoding="utf-8")
    tracemalloc.start()
    pieces = sum(1 for _ in documents.read_file(file, documents.Reading()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pieces > 1000
    assert peak < 2**20


def test_a_tokenizer_is_trained_on_a_sample_of_a_large_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "TOKENIZER_SAMPLE", 5000)
    seen: list[int] = []
    train = Tokenizer.train.__func__

    def count(cls, texts, vocab_size, exact=True):
        texts = list(texts)
        seen.append(sum(map(len, texts)))
        return train(cls, texts, vocab_size, exact)

    monkeypatch.setattr(Tokenizer, "train", classmethod(count))
    corpus = prepare(_folder(tmp_path, [_tale(n) for n in range(60)]), tmp_path / "out")
    assert 1000 < seen[0] < 12_000 < corpus.train_bytes


def test_the_error_for_a_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(MachineError, match="out") as error:
        prepare(_folder(tmp_path, [_tale(n) for n in range(30)]), tmp_path / "out")
    assert error.value.code == "E401"
    assert [path.name for path in tmp_path.iterdir()] == ["tales"]


TITLE = " ".join(a + b for a in "ABCDEFGHIJ" for b in "KLMNOPQRST")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "The hen slept. It was so late! \nNobody came, nobody. " * 9,
            {"It was so", "Nobody came, nobody.", "The hen slept."},
        ),
        (TITLE + "\n" + "the hen slept. " * 200, {"the hen slept."}),
        ("a hen and a cock " * 40, {"a hen and", "hen and a", "and a cock", "a cock a", "cock a hen"}),
        ("一二三四五六七八九十" * 40, None),
        ("Lebensjahre angesammelte herrliche. " * 40, {"Lebensjahre angesammelte"}),
        ("x", {"x"}),
        ("\n\n \n", {""}),
    ],
)
def test_a_few_words_of_the_held_out_text_begin_a_sentence_where_one_begins(
    tmp_path: Path, text: str, words: set[str] | None
) -> None:
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number}{text}", encoding="utf-8")
    found = prepare(tmp_path / "text", tmp_path / "data").words_held_out()
    assert len(found) <= 24 and "\ufffd" not in found and found == found.strip()
    assert words is None or found.lstrip("0123456789") in words
