"""What a training step on the CPU does between its matrix products, each in one pass over memory.

Arrays of activations are float32, or uint16 that hold bfloat16 (its bits are the upper half of a float32's, so a shift
widens them). All arithmetic is in float32; only what is stored is rounded, to nearest, ties to even. Compiled by numba
on first use and kept on disk; no kernel holds Python's lock, so several threads run them side by side.

    n  tokens of one worker: rows × T      g  query heads that share one key and value: H / K
"""

import math
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Sums may be reordered and products contracted, which lets the compiler use whole vectors. NaN and infinity stay what
# they are: a step that meets them must be noticed.
FAST = {"reassoc", "contract", "nsz", "arcp"}
F32, U16, I32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)

inlined = njit(fastmath=FAST, inline="always")


def kernel(function):
    """Compiled on first use, and kept beside this file or in the user's cache; each time anew where neither can be."""
    options = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    try:
        compiled = njit(function, cache=True, **options)
    except RuntimeError:  # numba found no folder that it may write to
        return njit(function, **options)
    cache = compiled._cache
    keep, kept = cache.save_overload, cache.load_overload

    # numba writes its list of what is kept, and then the code. Two processes at once could leave the list of the one
    # and the code of the other, which is not noticed when it is loaded.
    lock = FileLock(Path(cache.cache_path) / ".lock")

    def keep_if_possible(*given):
        with suppress(OSError), lock:  # such as a full disk
            keep(*given)

    def kept_if_whole(*given):
        try:
            with ExitStack() as stack:
                with suppress(OSError):  # a folder that may only be read
                    stack.enter_context(lock)
                return kept(*given)
        except Exception:  # whatever a file that was cut short makes of being unpickled
            with suppress(OSError):
                cache.flush()  # so that what is compiled now can be kept
            return None

    cache.save_overload, cache.load_overload = keep_if_possible, kept_if_whole
    return compiled


# ---- numbers -------------------------------------------------------------------------------------
@intrinsic
def widen(typing, x):
    """The float32 of a stored number."""
    if isinstance(x, types.Float):
        return types.float32(types.float32), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), I32(16)), F32)

    return types.float32(types.uint16), generate


@intrinsic
def narrow(typing, x, like):
    """A float32 as an array of `like`'s type stores it."""
    if isinstance(like, types.Float):
        return types.float32(types.float32, like), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):
        bits = builder.bitcast(args[0], I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, I32(0x7FFF))), I32(16)), U16)
        quiet = builder.trunc(builder.or_(builder.lshr(bits, I32(16)), I32(0x40)), U16)
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), quiet, rounded)

    return types.uint16(types.float32, types.uint16), generate


@intrinsic
def larger(typing, x, y):
    """The larger of two float32, as one instruction on whole vectors. Not defined where one is NaN: what is computed
    with the row afterwards is NaN then, whatever this says."""

    def generate(context, builder, signature, args):
        function = builder.module.declare_intrinsic("llvm.maxnum", [F32], ir.FunctionType(F32, [F32, F32]))
        return builder.call(function, args, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def power_of_two(typing, n):
    """2ⁿ of a whole n from -126 to 127: its exponent bits."""

    def generate(context, builder, signature, args):
        exponent = builder.add(builder.fptosi(args[0], I32), I32(127))
        return builder.bitcast(builder.shl(exponent, I32(23)), F32)

    return types.float32(types.float32), generate


@intrinsic
def random_bits(typing, key, counter):
    """32 bits that are a function of (key, counter): two rounds of multiply and shift, with the key before each."""

    def generate(context, builder, signature, args):
        key = builder.trunc(args[0], I32) if args[0].type.width > 32 else args[0]
        bits = builder.trunc(args[1], I32) if args[1].type.width > 32 else args[1]
        for multiplier in (0x7FEB352D, 0x846CA68B):  # by C. Wellons' search for integer hashes of low bias
            bits = builder.xor(bits, key)
            bits = builder.xor(bits, builder.lshr(bits, I32(16)))
            bits = builder.mul(bits, I32(multiplier))
            bits = builder.xor(bits, builder.lshr(bits, I32(15)))
        return bits

    return types.uint32(key, counter), generate


ZERO, HALF, ONE, LOWEST = np.float32(0), np.float32(0.5), np.float32(1), np.float32(-126)
LOG2E = np.float32(math.log2(math.e))
E0, E1, E2, E3, E4, E5, E6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(7))


@inlined
def exp2(x):
    """2ˣ for x up to 127, to 3e-7 of it; 2⁻¹²⁶ below -126. Taylor's series around the nearest whole number."""
    x = LOWEST if x < LOWEST else x
    whole = np.floor(x + HALF)
    r = x - whole
    return (E0 + r * (E1 + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6)))))) * power_of_two(whole)


@inlined
def sigmoid(x):
    y = -x * LOG2E
    y = np.float32(126) if y > np.float32(126) else y
    return ONE / (ONE + exp2(y))


@inlined
def copy(source, out):
    """As out[:] = source, several times as fast for a few numbers."""
    for i in range(source.shape[0]):
        out[i] = source[i]


@inlined
def kept(key, counter, threshold, scale):
    """What dropout multiplies this number with: 0, or `scale` = 1 / (1 - rate)."""
    return ZERO if random_bits(key, counter) < threshold else scale


# ---- kernels -------------------------------------------------------------------------------------
@kernel
def dropout(x, first, key, threshold, scale):
    """x (n, D), in place; `first` counts the numbers of the batch before x[0, 0]."""
    n, D = x.shape
    for t in range(n):
        row, at = x[t], first + t * D
        for d in range(D):
            row[d] = narrow(widen(row[d]) * kept(key, np.uint32(at + d), threshold, scale), row[d])


@kernel
def add_norm(before, branch, x, y, rms, gain, eps):
    """x = before + branch, y = x · rms · gain with rms = 1 / sqrt(mean(x²) + eps). All (n, D), rms (n), gain (D)."""
    n, D = x.shape
    for t in range(n):
        source, added, row, out = before[t], branch[t], x[t], y[t]
        squares = ZERO
        for d in range(D):
            value = source[d] + widen(added[d])
            row[d] = value
            squares += value * value
        r = ONE / np.sqrt(squares / np.float32(D) + eps)
        rms[t] = r
        for d in range(D):
            out[d] = narrow(row[d] * r * gain[d], out[d])


@kernel
def norm_backward(dy, x, rms, gain, dx, rounded, dgain):
    """Add to dx (n, D) what dy brings through the norm, and to dgain (D); `rounded` is a copy of dx to multiply."""
    n, D = x.shape
    for t in range(n):
        given, row, out, copy, r = dy[t], x[t], dx[t], rounded[t], rms[t]
        dot = ZERO
        for d in range(D):
            g, normed = widen(given[d]), row[d] * r
            dgain[d] += g * normed
            dot += g * gain[d] * normed
        mean = dot / np.float32(D)
        for d in range(D):
            value = out[d] + r * (widen(given[d]) * gain[d] - row[d] * r * mean)
            out[d] = value
            copy[d] = narrow(value, copy[d])


@kernel
def split_rotate(qkv, cos, sin, q, k, v, scale):
    """qkv (n, (H + 2K) hd) -> rotated q · scale (rows·K, T·g, hd), rotated k and v (rows·K, T, hd)."""
    T, half = cos.shape
    hd, shared = 2 * half, k.shape[0]
    g, K = q.shape[1] // T, shared * T // qkv.shape[0]
    for t in range(qkv.shape[0]):
        row, at = t // T, t % T
        c, s, source = cos[at], sin[at], qkv[t]
        for h in range((g + 1) * K):
            if h < g * K:
                out, factor = q[row * K + h // g, at * g + h % g], scale
            else:
                out, factor = k[row * K + h - g * K, at], ONE
            a, b = source[h * hd : h * hd + half], source[h * hd + half : (h + 1) * hd]
            low, high = out[:half], out[half:]
            for i in range(half):
                first, second = widen(a[i]), widen(b[i])
                low[i] = narrow((first * c[i] - second * s[i]) * factor, low[i])
                high[i] = narrow((second * c[i] + first * s[i]) * factor, high[i])
        for h in range(K):
            copy(source[((g + 1) * K + h) * hd : ((g + 1) * K + h + 1) * hd], v[row * K + h, at])


@kernel
def join_rotate_backward(dq, dk, dv, cos, sin, dqkv, scale):
    """The gradient of split_rotate: rotate back, into dqkv (n, (H + 2K) hd)."""
    T, half = cos.shape
    hd, shared = 2 * half, dk.shape[0]
    g, K = dq.shape[1] // T, shared * T // dqkv.shape[0]
    for t in range(dqkv.shape[0]):
        row, at = t // T, t % T
        c, s, out = cos[at], sin[at], dqkv[t]
        for h in range((g + 1) * K):
            if h < g * K:
                source, factor = dq[row * K + h // g, at * g + h % g], scale
            else:
                source, factor = dk[row * K + h - g * K, at], ONE
            a, b = out[h * hd : h * hd + half], out[h * hd + half : (h + 1) * hd]
            low, high = source[:half], source[half:]
            for i in range(half):
                first, second = widen(low[i]), widen(high[i])
                a[i] = narrow((first * c[i] + second * s[i]) * factor, a[i])
                b[i] = narrow((second * c[i] - first * s[i]) * factor, b[i])
        for h in range(K):
            copy(dv[row * K + h, at], out[((g + 1) * K + h) * hd : ((g + 1) * K + h + 1) * hd])


@kernel
def causal_softmax(scores, first, g, scratch):
    """Scores (·, queries · g, keys), already times log₂ e, become weights in place.

    Query i stands at position first + i // g and sees the keys up to its own.
    """
    for b in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            row, end = scores[b, i], first + i // g + 1
            most = np.float32(-np.inf)
            for j in range(end):
                most = larger(most, widen(row[j]))
            total = ZERO
            for j in range(end):
                weight = exp2(widen(row[j]) - most)
                scratch[j] = weight
                total += weight
            share = ONE / total
            for j in range(end):
                row[j] = narrow(scratch[j] * share, row[j])
            row[end:] = 0


@kernel
def causal_softmax_backward(weights, gradient, first, g):
    """The gradient of the weights becomes that of the scores in place."""
    for b in range(weights.shape[0]):
        for i in range(weights.shape[1]):
            w, d, end = weights[b, i], gradient[b, i], first + i // g + 1
            dot = ZERO
            for j in range(end):
                dot += widen(w[j]) * widen(d[j])
            for j in range(end):
                d[j] = narrow(widen(w[j]) * (widen(d[j]) - dot), d[j])
            d[end:] = 0


@kernel
def swiglu(gate_up, product):
    """gate_up (n, 2F) -> silu(gate) · up (n, F)."""
    n, width = product.shape
    for t in range(n):
        gate, up, out = gate_up[t, :width], gate_up[t, width:], product[t]
        for i in range(width):
            a = widen(gate[i])
            out[i] = narrow(a * sigmoid(a) * widen(up[i]), out[i])


@kernel
def swiglu_backward(gate_up, gradient):
    """gate_up (n, 2F) becomes its own gradient, given that of the product (n, F)."""
    n, width = gradient.shape
    for t in range(n):
        gate, up, given = gate_up[t, :width], gate_up[t, width:], gradient[t]
        for i in range(width):
            a, d = widen(gate[i]), widen(given[i])
            s = sigmoid(a)
            silu = a * s
            gate[i], up[i] = (
                narrow(d * widen(up[i]) * (s + silu * (ONE - s)), gate[i]),
                narrow(d * silu, up[i]),
            )


@kernel
def cross_entropy(logits, targets, ignore, scale, scratch):
    """Nats, summed over the targets (n) that are not `ignore`; logits (n, V) become (softmax - one-hot) · scale."""
    n, V = logits.shape
    nats = 0.0
    for t in range(n):
        row, target = logits[t], targets[t]
        if target == ignore:
            row[:] = 0
            continue
        most = np.float32(-np.inf)
        for j in range(V):
            most = larger(most, widen(row[j]))
        total, shift = ZERO, most * LOG2E
        for j in range(V):
            weight = exp2(widen(row[j]) * LOG2E - shift)
            scratch[j] = weight
            total += weight
        nats += math.log(total) + most - widen(row[target])
        share = scale / total
        for j in range(V):
            row[j] = narrow(scratch[j] * share, row[j])
        row[target] = narrow(scratch[target] * share - scale, row[target])
    return nats


@kernel
def add_up(parts, total, more):
    """total (N) = the sum of parts (workers, N), on top of what it holds if `more`."""
    workers, N = parts.shape
    for begin in range(0, N, 4096):
        end = min(begin + 4096, N)
        out = total[begin:end]
        if not more:
            out[:] = ZERO
        for w in range(workers):
            part = parts[w, begin:end]
            for i in range(end - begin):
                out[i] += widen(part[i])


@kernel
def add_rows(tokens, rows, table, begin, end):
    """table[tokens[t]] += rows[t] where begin ≤ tokens[t] < end: the gradient of a look-up.

    In the order of t, so that a sum has the same bits whoever takes which rows of the table.
    """
    for t in range(tokens.shape[0]):
        if begin <= tokens[t] < end:
            out, row = table[tokens[t]], rows[t]
            for d in range(row.shape[0]):
                out[d] += row[d]


@kernel
def rms_backward(dy, x, rms, dx):
    """Add to dx (n, D) what dy brings through y = x · rms, a norm without gains."""
    n, D = x.shape
    for t in range(n):
        given, row, out, r = dy[t], x[t], dx[t], rms[t]
        dot = ZERO
        for d in range(D):
            dot += given[d] * row[d]
        mean = dot * r * r / np.float32(D)
        for d in range(D):
            out[d] += r * (given[d] - row[d] * mean)
