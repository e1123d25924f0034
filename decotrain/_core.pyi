"""decotrain's collective core"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy
from numpy.typing import NDArray


class RoundResult:
    @property
    def tag(self) -> int: ...

    @property
    def seq(self) -> int: ...

    @property
    def view(self) -> int: ...

    @property
    def digest(self) -> int: ...

    @property
    def begun(self) -> bool: ...

    @property
    def contributors(self) -> list[int]: ...

    @property
    def chunk_bytes(self) -> list[int]: ...

    @property
    def peers(self) -> list[tuple[int, int]]: ...

    @property
    def outcome(self) -> str: ...

    @property
    def values(self) -> bytes:
        """All chunks, encoded, one after the other."""

    def chunk(self, chunk: int) -> bytes: ...

class Receiving:
    @property
    def accept(self) -> str: ...

    @property
    def reason(self) -> str: ...

    @property
    def payload_bytes(self) -> int: ...

def pack_spec(op: int = 0, rule: int = 0, contribution: int = 0, result: int = 0, rule_parameter: float = 0.0, elements: int = 0, chunk_elements: int = 262144, ahead: int = 0) -> bytes: ...

def digest(data: bytes) -> int: ...

class Engine:
    def __init__(self, peer: int, grace_s: float = 0.0, quorum: float = 1.0, done_bound_s: float = 0.0, parked_bytes: int = 67108864, missed_rounds: int = 4, missed_bytes: int = 4194304) -> None: ...

    def begin(self, tag: int, spec: bytes, data: bytes | None, weight: float = 1.0, state_digest: int = 0, encoded: bool = True, now: float = 0.0) -> int:
        """
        Copies `data` and begins the tag's next round; None contributes nothing.
        """

    def may_begin(self, tag: int, ahead: int = 0) -> bool: ...

    def next(self, tag: int) -> int: ...

    def ready(self, tag: int, seq: int) -> bool: ...

    def take_result(self, tag: int, seq: int) -> RoundResult: ...

    def missed(self, tag: int) -> list[int]: ...

    def declare(self, covered: Sequence[tuple[int, int]]) -> None: ...

    def set_covered(self, tag: int, seq: int) -> None: ...

    def next_frame(self, peer: int) -> bytes | None: ...

    def has_frames(self, peer: int) -> bool: ...

    def on_frame(self, peer: int, frame: bytes, now: float) -> str: ...

    def on_header(self, peer: int, frame: bytes, now: float) -> Receiving: ...

    def on_payload(self, peer: int, receiving: Receiving, payload: bytes, now: float) -> None: ...

    def on_link_reset(self, peer: int, now: float) -> None: ...

    def tick(self, now: float) -> None: ...

    def next_deadline(self) -> float: ...

    def freeze(self, term: int, number: int) -> dict: ...

    def install(self, plan: dict, now: float) -> bool: ...

    def view(self) -> dict: ...

    @property
    def frozen(self) -> bool: ...

    def take_events(self) -> list: ...

def codec_bytes(codec: str, elements: int) -> int:
    """Bytes of so many encoded values."""

def codec_pair(name: str) -> tuple[str, str]:
    """(contribution, result) codecs of a name such as 'int8' or 'e2m1+int8'."""

def codec_encode(codec: str, values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], as_cuda: bool = False) -> bool:
    """
    Encodes flat float32 values; False when one is NaN or infinite.
    as_cuda (tests): by the CUDA kernels' code, run on the CPU.
    """

def codec_encode_with_feedback(codec: str, values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], residual: Annotated[NDArray, dict(shape=(None,), order='C', device='cpu')], out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> bool:
    """
    Encodes y = values + residual and leaves y - decode(encode(y)) in the residual
    (float32, bfloat16, or uint16 that holds bfloat16); False, with the residual as before,
    when a sum is NaN or infinite.
    """

def codec_encode_stochastic(codec: str, values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], key: int, stream: int, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> bool:
    """Encodes with stochastic rounding (int8, e2m1, e3m0) from Philox."""

def codec_decode(codec: str, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], as_cuda: bool = False) -> bool:
    """Decodes into flat float32; False when the bytes are no valid encoding."""

def codec_valid(codec: str, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], elements: int) -> bool:
    """True when the bytes are a valid encoding of so many finite values."""

def codec_combine(rule: str, codec: str, contributions: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], weights: Sequence[float], elements: int, result_codec: str, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], parameter: float = 0.0, residual: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, lost: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')] | None = None) -> bool:
    """
    Combines encoded contributions in the order given into one encoded result; False when
    the value is not finite or the rule's parameter is wrong. The owner's feedback: residual
    is added to the value, and lost is then what the result lost.
    """

def topk_bytes(elements: int, k: int) -> int:
    """Bytes of the k largest of every 4096 values."""

def topk_encode(values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], k: int, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> bool:
    """
    Encodes the k largest magnitudes of every 4096; False when a value is NaN or infinite.
    """

def topk_add(data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], k: int, weight: float, total: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')]) -> bool:
    """
    total += weight * decoded; False, with total as before, for foreign or broken bytes.
    """

def pool_figures(reset_peak: bool = False) -> dict[str, Any]:
    """Memory of all rounds of this process: in use, at most, kept free."""

class Result:
    """What a round gave: the same bits on every peer."""

    @property
    def tag(self) -> int: ...

    @property
    def seq(self) -> int: ...

    @property
    def digest(self) -> int: ...

    @property
    def view(self) -> int: ...

    @property
    def begun(self) -> bool: ...

    @property
    def withdrawn(self) -> bool:
        """
        The borrowed buffer holds NaN or infinity; chunks that show it lack our contribution.
        """

    @property
    def outcome(self) -> str: ...

    @property
    def elements(self) -> int: ...

    @property
    def contributors(self) -> list[int]:
        """Peer ids in at least one chunk, by slot."""

    @property
    def slots(self) -> int:
        """Of the contributors when the round was made, a bit for each."""

    @property
    def chunk_contributors(self) -> list[list[int]]:
        """Peer ids, for each chunk."""

    @property
    def partial(self) -> bool:
        """
        Some chunk lacks a contributor that another one has, or nobody contributed.
        """

    def parts(self) -> dict[int, bytes]:
        """Of a collect round: slot -> bytes."""

    def decode_into(self, buffers: list[Any]) -> None:
        """Writes the result to a list of arrays; zeros where nobody contributed."""

    def keep_lost(self, owner_residual: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')]) -> None:
        """
        Of a round begun with this residual: replaces its parts by what our values lost.
        """

    def view_f32(self) -> object:
        """A read-only view of an f32 result in one piece, or None."""

    @property
    def codec(self) -> str: ...

    @property
    def chunk_elements(self) -> int: ...

    def encoded_into(self, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
        """
        Copies the encoded result, chunk after chunk; zeros where nobody contributed.
        """

class Work:
    """A round that was begun."""

    @property
    def tag(self) -> int: ...

    @property
    def seq(self) -> int | None: ...

    def done(self) -> bool: ...

    def wait(self, timeout_s: float = -1.0) -> bool:
        """False when the time is over first. Below zero: no bound."""

    def result(self) -> Result | None:
        """
        After wait(). None: missed results must be taken before this round can begin.
        """

class Fetch:
    """A fragment on its way into the caller's arrays."""

    def done(self) -> bool: ...

    def wait(self, timeout_s: float = -1.0) -> bool:
        """False when the time is over first. Below zero: no bound."""

    def wait_quiet(self, timeout_s: float) -> bool:
        """False when the time is over before every request is answered."""

    @property
    def version(self) -> int | None:
        """Of the pieces here; final when done."""

    @property
    def bytes(self) -> int: ...

    @property
    def other_bytes(self) -> int:
        """
        The size of what all servers hold instead: another size, or another kind. 0: it fits.
        """

    @property
    def total_bytes(self) -> int: ...

    @property
    def restarts(self) -> int:
        """How often the version moved and everything was asked for again."""

    @property
    def damaged(self) -> int:
        """Pieces whose digest was wrong; they were asked for again."""

class Node:
    """A peer's rounds and links, on a thread of its own."""

    def __init__(self, peer: int, listen: Sequence[str], run_fingerprint: int, *, streams: int = 0, force_tcp: bool = False, link_timeout_s: float = 5.0, grace_s: float = 0.0, quorum: float = 1.0, done_bound_s: float = 0.0, tls_key: bytes = ..., pair_keys: bool = False, congestion: str = 'bbr', pace: bool = True, shared_memory: bool = True) -> None: ...

    @property
    def peer(self) -> int: ...

    @property
    def addresses(self) -> list[str]: ...

    @property
    def event_fd(self) -> int:
        """Readable while there are events."""

    def begin(self, buffers: list[Any], *, tag: int = 0, op: str = 'mean', codec: str = 'f32', result_codec: str | None = None, weight: float = 1.0, borrow: bool = False, residual: list[Any] | None = None, state_digest: int = 0, rule: str | None = None, rule_parameter: float = 0.0, chunk_elements: int | None = None, chance: int | None = None, owner_residual: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None) -> Work:
        """
        Begins the tag's next round with the buffers as one flat space; returns at once.
        """

    def collect(self, data: bytes | None, *, tag: int = 0, max_bytes: int = 65536, state_digest: int = 0, ahead: int = 0) -> Work: ...

    def missed(self, tag: int) -> list[int]: ...

    def take_missed(self, tag: int) -> list[Result]: ...

    def declare(self, covered: Sequence[tuple[int, int]]) -> None: ...

    def set_covered(self, tag: int, seq: int) -> None: ...

    def freeze(self, term: int, number: int) -> dict[str, Any]:
        """Stops rounds; the report (docs/protocol.md)."""

    def install(self, plan: dict[str, Any]) -> bool:
        """False when it does not answer the newest freeze."""

    @property
    def view(self) -> dict[str, Any]: ...

    def set_peers(self, peers: Sequence[tuple[int, int, Sequence[str]]], keys: Mapping[int, bytes] = {}) -> None:
        """
        Everybody in the view: (peer, slot, addresses), and keys of TLS that we share with one of them alone.
        """

    def set_route(self, peer: int, via: int) -> None: ...

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call: kind, tag, seq, peer, detail."""

    def links(self) -> list[dict[str, Any]]:
        """
        One map for each link: peer, up, ours, unix, tls, streams, bytes, rates, congestion, via.
        """

    def measures(self) -> dict[str, Any]:
        """
        uplink_bps (0: not measured), for whose contributions alone we waited how long, and bytes over all links there ever were.
        """

    def close(self) -> None: ...

    def begin_encoded(self, encoded: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], elements: int, *, tag: int, op: str, codec: str, result_codec: str, weight: float, state_digest: int, rule: str | None, rule_parameter: float, chunk_elements: int, owner_residual: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None) -> Work:
        """
        Begins a round with encoded chunks that need not be there yet: chunks_ready follows.
        """

    def chunks_ready(self, work: Work, chunks: int) -> None:
        """
        So many chunks of a round of begin_encoded, from the first on, are there.
        """

    def abandon(self, work: Work) -> None:
        """
        The chunks that are not there will never be: our contribution ends here.
        """

    def publish(self, tag: int, arrays: list[Any], version: int, kind: int = 0) -> None:
        """
        Serves the arrays from where they lie: write to them only between begin_update and end_update. `kind`, a digest of what they are, is compared with the fetcher's.
        """

    def withdraw(self, tag: int) -> None: ...

    def begin_update(self, tag: int) -> None: ...

    def end_update(self, tag: int, version: int) -> None: ...

    def published_version(self, tag: int) -> int | None: ...

    def fetch(self, tag: int, peers: Sequence[int], into: list[Any], follows: bool = False, kind: int = 0) -> Fetch:
        """
        Pulls the fragment from these peers; the arrays belong to the fetch until it is done or cancelled. With `follows` it does not start again when the version moves: the caller moves what is there along, with pause_fetch, lock_fetch and advance_fetch.
        """

    def pause_fetch(self, fetch: Fetch) -> None:
        """No more requests until advance_fetch."""

    def lock_fetch(self, fetch: Fetch) -> bool:
        """
        The arrays are the caller's until advance_fetch. False: the fetch has ended.
        """

    def advance_fetch(self, fetch: Fetch, version: int) -> None:
        """What is there has moved to this version."""

    def set_fetch_peers(self, fetch: Fetch, peers: Sequence[int]) -> None:
        """Others to ask from now on; what is fetched stays."""

    def cancel(self, fetch: Fetch) -> None: ...

def round_chunk_elements(elements: int) -> int:
    """Elements of a chunk in a round of so many, when the caller names none."""

def spsa_perturb(theta: object, out: object, key: int, c2: int, c3: int, epsilon: float, first: int = 0, noise: str = 'rademacher') -> None:
    """
    out = cast(theta + epsilon * z). theta is flat float32, out float32, bfloat16 or float16;
    element 0 of both is element `first` of the parameter space.
    """

def spsa_replay(theta: object, key: int, streams: object, values: object, counts: object, rates: object, decays: object, first: int = 0, noise: str = 'rademacher') -> None:
    """
    For each step s in order: theta = theta * decays[s] - rates[s] * sum of value * z over
    its counts[s] terms, in place, one pass over memory.
    """

def spsa_encode(values: object) -> bytes:
    """The one-byte code of each float32 value."""

def spsa_magnitudes() -> list[float]:
    """The 128 magnitudes of the one-byte code."""

def simd() -> str:
    """The SIMD level in use: scalar, avx2, avx512 or neon."""

def set_simd(level: str) -> str:
    """
    For tests: use this SIMD level, or the CPU's best below; returns the one in use.
    """
