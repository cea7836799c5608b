"""Estimates the tokens of a corpus before it is prepared. Nothing is written or downloaded.

The number is exact for `char`, and for `byte` with plain text. For a byte-pair encoding, a few
chunks of the corpus are encoded, if the ranks are on this machine or are trained on the corpus.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.data import corpus
from orchestrator.data.corpus import Listing
from orchestrator.data.documents import Piece, Span, read_pieces, reader_of
from orchestrator.data.input.kinds import kind_of as kind_of_file
from orchestrator.data.tasks import count, plan_chunks
from orchestrator.data.tokenizer import has_ranks, kind_of, load_tokenizer
from orchestrator.data.tokenizers import merges
from orchestrator.data.tokenizers.encoder import check_encoder
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

BYTES_PER_TOKEN = 4.0  # English, vocabulary of 50,000; used if nothing can be encoded
SAMPLES = 8  # chunks of a sample
SAMPLE_BYTES = 64 << 10  # of each of them, at most
# Of a sample for an estimate: training merges on it takes the most time of a dry run.
ESTIMATE_SAMPLES = 32
ESTIMATE_BYTES = 256 << 10
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class TokenEstimate:
    """Size of a corpus. Values that need a download or a preparation are None."""

    bytes: int | None
    tokens: int | None
    exact: bool
    n_vocab: int | None


def estimate_tokens(data: "Data", sources: Listing | None = None) -> TokenEstimate:
    """Estimate the size of the whole corpus.

    Args:
        data: The `data` section.
        sources: The files of the corpus, if they were listed already.

    Raises:
        UserError: A path is missing or the tokenizer is unknown. For `char`, also the errors of
            reading the whole corpus.
    """
    name = data.tokenizer
    check_encoder(data.encoder, name)
    sources = sources or corpus.resolve(data.corpus)
    n_vocab = kind_of(name).n_vocab
    counts = kind_of(name).counts
    if any(source.size is None for source in sources):
        return TokenEstimate(None, None, False, n_vocab)
    size = sum(source.bytes for source in sources)
    if counts == "characters":
        chunks = plan_chunks(sources, CHUNK_BYTES, data)
        characters, seen = count(span for spans in chunks for span in spans)
        return TokenEstimate(size, characters, True, len(seen))

    documents = 0  # documents whose end-of-text token `_bytes_per_token` does not count
    plain = all(reader_of(source.path).one_document for source in sources)
    if plain and data.append_eot:
        documents = len(sources)
    if any(kind_of_file(source.path).packing for source in sources):
        return TokenEstimate(size, None, False, n_vocab)
    if counts == "bytes" and plain and data.invalid_utf8 == "stop":
        return TokenEstimate(size, size + documents, True, n_vocab)
    bytes_per_token = BYTES_PER_TOKEN
    if has_ranks(name) or kind_of(name).train is not None:
        bytes_per_token = _bytes_per_token(plan_chunks(sources, SAMPLE_BYTES, data), data)
    return TokenEstimate(size, round(size / bytes_per_token) + documents, False, n_vocab)


def _bytes_per_token(chunks: list[list[Span]], data: "Data") -> float:
    """Return bytes of files per token, from chunks that are spread evenly over the corpus."""
    size = ESTIMATE_BYTES // min(ESTIMATE_SAMPLES, len(chunks) or 1)
    pieces = list(sample(chunks, ESTIMATE_SAMPLES, min(size, SAMPLE_BYTES)))
    train = kind_of(data.tokenizer).train
    if train is None:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        try:
            tokenizer = train(merges.count_words(piece.text for piece in pieces), lambda _: None)
        except UserError:  # the sample is too small for so many tokens
            return BYTES_PER_TOKEN
    read = 0.0
    tokens = 0
    for piece in pieces:
        read += piece.size
        has_eot = data.append_eot and piece.starts and piece.ends
        tokens += len(tokenizer.encode(piece.text)) + has_eot
    return read / tokens if tokens > 0 else BYTES_PER_TOKEN


def sample(
    chunks: list[list[Span]], samples: int = SAMPLES, size: int = SAMPLE_BYTES
) -> Iterator[Piece]:
    """Return pieces of at most `size` bytes from `samples` chunks over the whole corpus."""
    count = min(samples, len(chunks))
    for spans in (chunks[i * len(chunks) // count] for i in range(count)):
        room = float(size)
        for piece in _pieces(spans, size):
            # A text that cannot be cut may be one piece of many megabytes.
            text = piece.text[:size]
            bytes_read = piece.size * len(text) / max(1, len(piece.text))
            yield replace(piece, text=text, size=bytes_read)
            room -= piece.size or len(text)  # the size of a packed piece is not known
            if room <= 0:
                break


def _pieces(spans: list[Span], size: int) -> Iterator[Piece]:
    for span in spans:
        if reader_of(span.path).one_document:  # it is read at once
            span = replace(span, end=min(span.end, span.start + size))
        yield from read_pieces(span)
