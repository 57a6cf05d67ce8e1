"""Text to ids: the tokenizer, the 17 multimodal tokens, the chat format, and the expansion of placeholders to slots.

`python -m data_pipelines.tokens --corpus FILE --out FILE` trains the small tokenizer of the tiny configs.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from crab_jax.io import packaged, paths
from crab_jax.io.bounds import ANYWHERE, Anything, Text, Whole
from crab_jax.io.errors import CommandLine, InputError, run_verb
from crab_jax.io.files import out_file, refuse_stand_in, write_whole
from crab_jax.io.structured import SETTINGS, Null, check, read_json, read_text, refuse_special
from data_pipelines.examples import read_jsonl

# The released order (models/unified_arch.py): ids are base vocabulary size + position in this tuple. The first 11 are
# special, so they disappear from decoded answers; the mask tokens are ordinary and stay.
SPECIAL_TOKENS = (
    "<image>", "<image_start>", "<image_end>", "<video>", "<video_start>", "<video_end>",
    "<audio>", "<audio_start>", "<audio_end>", "<mask_start>", "<mask_end>",
)  # fmt: skip
MASK_TOKENS = tuple(f"<mask_{i}>" for i in range(6))
VISUAL_PLACEHOLDERS = ("<video>", "<image>")
AUDIO_PLACEHOLDER = "<audio>"
BOS, EOS = "<s>", "</s>"
SYSTEM = "You are a helpful assistant."
# What transformers reads of the tokenizer of a LLaMA directory.
LLAMA_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def chat_prompt(instruction: str) -> str:
    """Return the text of one user turn in the LLaMA-2 chat format, with the reference's system message."""
    return f"{BOS}[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{instruction.strip()} [/INST]"


class Expanded(NamedTuple):
    """A sequence whose placeholders became runs of feature slots; all arrays have the same length L."""

    tokens: np.ndarray  # int32[L], a slot holds its placeholder's id
    slots: np.ndarray  # int32[L], row of the features that a position takes, -1 = text
    loss_mask: np.ndarray  # bool[L], targets
    mask_positions: np.ndarray  # int32[6], positions that predict <mask_0..5>; -1 without mask tokens


class Tokenizer:
    """Tokenisation of prompts and targets by any `tokenizers.Tokenizer`, extended by the 17 multimodal tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, legacy: bool | None = None):
        """Add the multimodal tokens to `backend`. Raises InputError.

        legacy: how a LLaMA tokenizer treats added tokens (see `load`), None for any other tokenizer. Truncation and
        padding of the tokenizer file are switched off: they would silently cut prompts.
        """
        self.where = "the tokenizer"
        backend.no_truncation()
        backend.no_padding()
        missing = [token for token in (BOS, EOS) if backend.token_to_id(token) is None]
        if missing:
            raise InputError("tokenizer", "vocab", f"has no {' and no '.join(missing)}", "use a LLaMA-style tokenizer")
        first = backend.token_to_id(SPECIAL_TOKENS[0])
        self.base: int = backend.get_vocab_size(with_added_tokens=True) if first is None else first
        if first is None:
            backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
            backend.add_tokens([AddedToken(t, normalized=False) for t in MASK_TOKENS])
        if (
            len(set(backend.get_vocab().values())) < backend.get_vocab_size()
            or max(backend.get_vocab().values()) >= self.base + 17
        ):
            raise InputError(
                "tokenizer",
                "vocab",
                "has ids that are not consecutive from 0, one per token",
                "use the tokenizer of the base model",
            )
        expected = list(range(self.base, self.base + 17))
        if [backend.token_to_id(token) for token in SPECIAL_TOKENS + MASK_TOKENS] != expected:
            problem = "has some of the multimodal tokens already, in another order"
            raise InputError("tokenizer", "vocab", problem, "use the tokenizer of the base model")
        self._backend, self._legacy = backend, legacy
        self._added = tuple(token.content for token in backend.get_added_tokens_decoder().values())
        self.vocab_size = self.base + 17
        self.bos_id, self.eos_id = self.id(BOS), self.id(EOS)
        pad = backend.token_to_id("<pad>")
        self.pad_id = self.eos_id if pad is None else pad
        self.mask_ids = tuple(expected[-6:])

    def digest(self) -> str:
        """Return a hash of everything that determines the ids of a text."""
        return hashlib.blake2b(f"{self._legacy} {self._backend.to_str()}".encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, path: str | Path, legacy: bool | None = None) -> Tokenizer:
        """Load a tokenizer.json, or a folder: one that `save` wrote, or one in Hugging Face form.

        A LLaMA directory (tokenizer.model, or tokenizer_class LlamaTokenizer) gives the ids of the slow LlamaTokenizer
        of transformers 4.37.2. There `legacy` (default: of tokenizer_config.json, where absent and null mean True) puts
        a word mark before every run of text between added tokens; otherwise only the start of the whole text gets one.
        Raises InputError for a file that is missing, damaged, or a placeholder.
        """
        path = packaged.located(path)
        with _refusing(path), _silent():
            loaded = cls._load(path, legacy)
            loaded.where = str(path)
            loaded._backend.decode(loaded.ids(_TRIAL))  # some faults only show with the first text
        return loaded

    @classmethod
    def _load(cls, path: Path, legacy: bool | None) -> Tokenizer:
        folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
        config = _read_config(folder)
        has_model = path.is_dir() and (folder / "tokenizer.model").is_file()
        if not has_model and not str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer"):
            return cls(_read_backend(file))
        backend = _convert(folder) if has_model and not file.is_file() else _read_backend(file)
        stated = config.get("legacy")
        if not isinstance(stated, bool | None):
            raise InputError(
                str(folder / "tokenizer_config.json"), "legacy", f"is {stated!r:.40}", "give true, false or null"
            )
        legacy = stated is not False if legacy is None else legacy
        marks = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marks]) if legacy else marks
        backend.pre_tokenizer = None
        return cls(backend, legacy)

    def save(self, folder: str | Path) -> None:
        """Write the files that `load(folder)` needs: tokenizer.json, and tokenizer_config.json for a LLaMA one."""
        write_whole(paths.at(folder) / "tokenizer.json", self._backend.to_str(pretty=True))
        if self._legacy is not None:
            config = {"tokenizer_class": "LlamaTokenizer", "legacy": self._legacy}
            write_whole(paths.at(folder) / "tokenizer_config.json", json.dumps(config))

    def id(self, token: str) -> int:
        """Return the id of one token of the vocabulary. Raises KeyError."""
        number = self._backend.token_to_id(token)
        if number is None:
            raise KeyError(token)
        return number

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text; added tokens are recognised, and no special tokens are added."""
        if self._legacy is False and text and not text.startswith(self._added):
            text = "▁" + text
        try:
            with _refusing(self.where):
                return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise InputError(
                "a prompt or target", "", f"holds bytes that are not text: {text!r:.200}", "write it in UTF-8"
            ) from None

    def encode(self, instruction: str, target: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32[N], is_target bool[N]) of the wrapped instruction and, unless None, `target + "</s>"`.

        The two are tokenised separately and concatenated, as in dataset/unified_dataset.py.
        """
        prompt = self._prompt(instruction)
        answer = [] if target is None else self.ids(target + EOS)
        return np.array(prompt + answer, np.int32), np.arange(len(prompt) + len(answer)) >= len(prompt)

    def counts(self, texts: Sequence[str], prompts: bool) -> np.ndarray:
        """Return int32[N,4]: the number of ids that `encode` gives each text, and of <video>, <image>, <audio> in them.

        prompts: the texts are instructions; otherwise targets. A row of -1 stands for a text that is refused.
        """
        whole = [chat_prompt(text) if prompts else text + EOS for text in texts]
        if self._legacy is False:
            whole = [text if text.startswith(self._added) else "▁" + text for text in whole]
        try:
            with _refusing(self.where):
                encodings = self._backend.encode_batch_fast(whole, add_special_tokens=False)
        except (InputError, TypeError, UnicodeEncodeError):  # in one of them
            if len(texts) == 1:
                return np.full((1, 4), -1, np.int32)
            half = len(texts) // 2
            return np.concatenate([self.counts(texts[:half], prompts), self.counts(texts[half:], prompts)])
        asked = [self.id(name) for name in (*VISUAL_PLACEHOLDERS, AUDIO_PLACEHOLDER)]
        found = np.empty((len(texts), 4), np.int32)
        for row, encoding in zip(found, encodings, strict=True):
            ids = encoding.ids
            row[:] = len(ids), *map(ids.count, asked)
        return found

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a process has one tokenizer, and most tasks one prompt
    def _prompt(self, instruction: str) -> list[int]:
        """Return the ids of the wrapped instruction; the caller must not change the list."""
        return self.ids(chat_prompt(instruction))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids, up to the first `</s>` when special tokens are skipped; mask tokens stay."""
        ids = [int(i) for i in ids]
        if skip_special_tokens and self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def length(self, ids: np.ndarray, rows: Mapping[str, np.ndarray]) -> int:
        """Return the number of positions that `expand` gives."""
        return int(self._lengths(ids, rows).sum())

    def _lengths(self, ids: np.ndarray, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return int[N]: the number of positions of each id."""
        lengths = np.ones(len(ids), int)
        for name, run in rows.items():
            lengths[ids == self.id(name)] = len(run)
        return lengths

    def expand(self, ids: np.ndarray, is_target: np.ndarray, rows: Mapping[str, np.ndarray]) -> Expanded:
        """Replace each placeholder by its run of feature slots.

        ids: int32[N]; is_target: bool[N]; rows: placeholder -> int[n], its feature rows in order. Source:
        prepare_multimodal_inputs (models/unified_arch.py); the position of a mask token minus one predicts it.
        """
        lengths = self._lengths(ids, rows)
        tokens, loss_mask = np.repeat(ids.astype(np.int32), lengths), np.repeat(is_target, lengths)
        slots = np.full(len(tokens), -1, np.int32)
        for name, run in rows.items():
            places = np.flatnonzero(tokens == self.id(name))
            slots[places] = np.resize(run, len(places))  # once for each placeholder
        positions = np.full(len(self.mask_ids), -1, np.int32)
        masks = np.flatnonzero(loss_mask & (tokens >= self.mask_ids[0]))[::-1]  # the first of a kind is written last
        positions[tokens[masks] - self.mask_ids[0]] = masks - 1
        return Expanded(tokens, slots, loss_mask, positions)


_ID = Whole(0, 2**24)
TOKENIZER = {"model": {}, "added_tokens?": [{"id": _ID, "content": Text(1)}]}
# A Unigram model has a list as its vocabulary. The Rust library panics on a long prefix.
VOCABULARY = {"vocab?": Anything(), "type?": Null(Text(1)), "continuing_subword_prefix?": Null(Text(0, 2))}
CONFIG = {"tokenizer_class?": Null(Text())}
GROWTH = 1000  # largest factor by which normalisation may lengthen a text
_TRIAL = "<video>\n<audio> An \u00e9, 12  \u526a \U0001f600 <mask_0> </s>"


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise InputError(str(path), "tokenizer", "no such file", "give a tokenizer.json or a LLaMA directory")
    content = read_json(path, TOKENIZER, "tokenizer")
    check(content["model"], VOCABULARY, str(path), "model")
    if content["model"].get("dropout"):
        raise InputError(str(path), "model.dropout", "makes the ids of a text random", "set it to null")
    _check_normalizer(content.get("normalizer"), str(path))
    return tokenizers.Tokenizer.from_file(str(paths.local(path)))


def _check_normalizer(normalizer: Any, where: str) -> int:
    """Return the factor by which a normalizer may lengthen a text, at most GROWTH.

    Raises InputError for a larger factor, and for content on which the Rust library would abort the process.
    """

    def refuse(problem: str) -> InputError:
        return InputError(where, "normalizer", problem, "use the tokenizer of the base model")

    if not isinstance(normalizer, dict):
        return 1
    times, content = 1, normalizer.get("content")
    if normalizer.get("type") == "Replace" and isinstance(content, str):
        if normalizer.get("pattern") == {"String": ""}:
            raise refuse("replaces nothing by something")
        times = max(1, len(content))
    for inner in normalizer.get("normalizers") or ():
        times = min(times * _check_normalizer(inner, where), GROWTH + 1)
    if times > GROWTH:
        raise refuse(f"makes texts more than {GROWTH} times as long")
    if isinstance(table := normalizer.get("precompiled_charsmap"), str):
        try:
            start = base64.b64decode(table[:8])
        except ValueError:
            start = b"\xff" * 4
        if int.from_bytes(start[:4], "little") > len(table):
            raise refuse("holds a table that is cut off")
    return times


@contextlib.contextmanager
def _refusing(where: str | Path) -> Iterator[None]:
    """Convert errors of the Rust library to InputError: plain Exceptions, and panics, which are no Exceptions."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            str(where),
            "tokenizer",
            f"cannot be used ({' '.join(str(error).split()):.200})",
            "give the tokenizer.json of the base model",
        ) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide what the Rust library prints when it panics: the error reports it."""
    sys.stderr.flush()
    before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a LLaMA directory's tokenizer.model, a sentencepiece file. Raises InputError."""
    if paths.is_remote(folder):
        with tempfile.TemporaryDirectory() as copy:
            for name in filter(lambda name: (folder / name).is_file(), LLAMA_FILES):
                shutil.copyfile(paths.local(folder / name), paths.at(copy) / name)
            return _convert(paths.at(copy))
    refuse_special(folder / "tokenizer.model", "tokenizer", SETTINGS)
    refuse_stand_in(folder / "tokenizer.model", "tokenizer")
    import sentencepiece  # imported late: only the conversion needs it and transformers, which is slow to import
    from transformers import LlamaTokenizer

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        backend: tokenizers.Tokenizer = LlamaTokenizer.from_pretrained(str(folder)).backend_tokenizer
        backend.model = _merging_by_score(pieces)
    except Exception as error:  # transformers, sentencepiece and tiktoken raise errors of many kinds
        raise InputError(
            str(folder / "tokenizer.model"),
            "tokenizer",
            f"cannot be read ({error.__class__.__name__}: {' '.join(str(error).split()):.120})",
            "fetch the LLaMA directory again",
        ) from None
    return backend


def _merging_by_score(pieces: Any) -> models.BPE:
    """Return the merges of a sentencepiece model, best score first.

    transformers 5 orders merges by id instead, which is wrong for LLaMA's runs of spaces: their scores are the lowest.
    """
    vocab = {pieces.id_to_piece(number): number for number in range(pieces.get_piece_size())}
    merges = []
    for piece, number in vocab.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = sorted(
            (vocab[left], vocab[right], (left, right)) for left, right in halves if left in vocab and right in vocab
        )
        merges += [(-pieces.get_score(number), pair) for *_, pair in pairs]
    return models.BPE(
        vocab,
        [pair for _, pair in sorted(merges, key=lambda merge: merge[0])],
        unk_token=pieces.id_to_piece(pieces.unk_id()),
        fuse_unk=True,
        byte_fallback=True,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path, CONFIG, "tokenizer") if paths.exists(path) else {}


def train_tiny_tokenizer(corpus: Iterable[str], path: str | Path, vocab_size: int = 640) -> None:
    """Train a byte-level BPE on a corpus and save it as a tokenizer.json.

    Any text encodes and decodes to itself, each digit is a token, and frequent words are single tokens. `<unk>`, `<s>`,
    `</s>` and `<pad>` have ids 0 to 3; the multimodal tokens are left out, `Tokenizer` adds them.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", BOS, EOS, "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    added = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, *MASK_TOKENS, BOS, EOS))))
    backend.train_from_iterator((piece for text in corpus for piece in added.split(text) if piece), trainer)
    write_whole(path, backend.to_str(pretty=True))


def corpus_texts(path: str | Path) -> Iterator[str]:
    """Yield texts to train on: wrapped instructions and targets of Examples (.jsonl), or the lines of a text file."""
    path = paths.at(path)
    if path.suffix == ".jsonl":
        for example in read_jsonl(path):
            yield chat_prompt(example.instruction)
            yield example.target
    elif path.is_file():
        yield from read_text(path, "--corpus").splitlines(keepends=True)
    else:
        raise InputError(str(path), "--corpus", "no such file", "give a .jsonl of examples or a text file")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `train_tiny_tokenizer`."""
    run_verb(lambda: _train_from(argv))


def _train_from(argv: Sequence[str] | None) -> None:
    parser = CommandLine("Train the small tokenizer of the tiny configs.", "python -m data_pipelines.tokens")
    parser.add_argument("--corpus", type=ANYWHERE, required=True, help="a .jsonl of examples, or a text file")
    parser.add_argument("--out", type=ANYWHERE, required=True, help="the tokenizer.json to write")
    parser.add_argument("--vocab-size", type=Whole(300, 2**20), default=640)
    arguments = parser.parse_args(argv)
    out_file(arguments.out)
    train_tiny_tokenizer(corpus_texts(arguments.corpus), arguments.out, arguments.vocab_size)


if __name__ == "__main__":
    main()
