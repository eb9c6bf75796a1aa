"""Embeddings of a data set in parts, by one or several ranks: finished parts are files, which are joined at the end.

Parts are cut by the numbers of the images, not by ranks, so that the joined file has the same bytes for any number of
ranks. A command that was stopped leaves its finished parts; the next one computes only the others.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from inbatch.errors import ConfigError, DataError, InbatchError, many
from inbatch.evaluation.embed import Source, embed_stream
from inbatch.evaluation.embeddings import Embeddings
from inbatch.evaluation.export import Tokens, check_output, numbers, write_embeddings
from inbatch.runtime import distributed
from inbatch.runtime.files import locked, read_json, replacing, write_json
from inbatch.runtime.process_group import advance, follow

BATCH = 256
"""Images per chunk."""
_CHUNKS = 16  # per part: 4,096 images; with tokens, which are a hundred times larger, 1
_FACTS = "parts.json"
_WORK, _JOIN = "parts", "join"


@dataclass(frozen=True)
class _Part:
    """Images of one split that are embedded together: their numbers in the split."""

    split: str
    numbers: range
    file: Path


class EmbeddingParts:
    """Parts of a file of embeddings, in the folder FILE.parts next to it, which all ranks must be able to read.

    Args:
        encoder: The encoder.
        sources: The images by split.
        out: The file.
        tokens: Layout of a file of tokens.
        facts: Everything except the images that determines the features, by name; parts with other facts are computed
            again.
    """

    def __init__(
        self, encoder: Any, sources: Mapping[str, Source], out: Path, tokens: Tokens | None, facts: Mapping[str, str]
    ) -> None:
        self.encoder, self.sources, self.out, self.tokens, self.facts = encoder, sources, out, tokens, dict(facts)
        self.folder = out.with_name(f"{out.name}.parts")
        size = BATCH * (_CHUNKS if tokens is None else 1)
        starts = [(name, at) for name, source in sources.items() for at in range(0, len(source), size)]
        self.parts = [
            _Part(name, range(at, min(at + size, len(sources[name]))), self.folder / f"{i:06}.safetensors")
            for i, (name, at) in enumerate(starts)
        ]

    def write(
        self, missing: dict[int, str] | None, notify: Callable[[str], None], shown: Callable[[Any, int], Iterable[Any]]
    ) -> int:
        """Embed all images, this rank its share of the parts, and write the file on rank 0; return its number of rows.

        Args:
            missing: Receives the unreadable images (number over all splits: reason); None: they raise DataError.
            notify: Prints a sentence.
            shown: Returns chunks and shows how many of a number of images are done.
        """
        main = distributed.rank() == 0
        if main:
            check_output(self.out)
        with locked(self.folder) if main else nullcontext():
            try:
                todo = self._shared(self._unfinished(notify) if main else None)
                self._embed(todo, missing, shown)
                count = self._joined(missing, main)
            except BaseException:
                if main and not any(part.file.exists() for part in self.parts):
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise
        return count

    def _unfinished(self, notify: Callable[[str], None]) -> tuple[str, list[int]]:
        """Return a token of this command and the numbers of the parts to embed; remove parts of other features."""
        earlier: dict[str, Any] = {}
        with suppress(DataError):
            earlier = read_json(self.folder / _FACTS)
        if earlier and earlier.get("facts") != self.facts:
            other = earlier.get("facts")
            known = other if isinstance(other, dict) else {}
            names = [name for name in self.facts | known if known.get(name) != self.facts.get(name)]
            notify(
                f"{self.folder} holds unfinished features of another {' and '.join(names)}: they are removed, and all "
                "images are embedded"
            )
        if earlier.get("facts") != self.facts:
            for file in self.folder.glob("*.safetensors"):
                file.unlink()
        todo = [i for i, part in enumerate(self.parts) if not _readable(part.file)]
        if len(todo) < len(self.parts):
            count = sum(len(self.parts[i].numbers) for i in set(range(len(self.parts))) - set(todo))
            notify(f"{many(count, 'image')} embedded by an earlier command, in {self.folder}, are not embedded again")
        token = uuid.uuid4().hex
        write_json(self.folder / _FACTS, {"facts": self.facts, "token": token})
        return token, todo

    def _shared(self, plan: tuple[str, list[int]] | None) -> list[int]:
        """Return the numbers of the parts that this rank embeds; raise ConfigError if it does not see the folder."""
        token, todo = distributed.broadcast_object(plan)
        seen: Any = None
        with suppress(DataError):
            seen = read_json(self.folder / _FACTS).get("token")
        if seen != token:
            error = ConfigError(
                f"rank {distributed.rank()} does not see the folder {self.folder} of rank 0: choose an output file "
                "on a disk that all machines share"
            )
            error.alone = True
            raise error
        rank, world = distributed.rank(), distributed.world()
        share: list[int] = todo[len(todo) * rank // world : len(todo) * (rank + 1) // world]
        return share

    def _embed(
        self, todo: Sequence[int], missing: dict[int, str] | None, shown: Callable[[Any, int], Iterable[Any]]
    ) -> None:
        """Embed parts, and write the file of each."""

        def chunks() -> Iterator[Embeddings]:
            for i in todo:
                part, bad, done = self.parts[i], None if missing is None else dict[int, str](), list[Embeddings]()
                for chunk in embed_stream(
                    self.encoder, self.sources[part.split], batch=BATCH, missing=bad, numbers=part.numbers
                ):
                    done.append(chunk)
                    advance(_WORK)
                    yield chunk
                _save(part.file, done, bad or {}, self.tokens)

        for _ in shown(chunks(), sum(len(self.parts[i].numbers) for i in todo)):
            pass
        advance(_WORK, finished=True)

    def _joined(self, missing: dict[int, str] | None, main: bool) -> int:
        """Write the file from its parts on rank 0, when all ranks have embedded theirs, and remove the parts."""
        count = 0
        if main:
            follow(_WORK, range(1, distributed.world()))
            bad: dict[int, str] = {}
            count = write_embeddings(self.out, self._chunks(bad), self.tokens)
            if missing is not None:
                missing |= bad
            shutil.rmtree(self.folder, ignore_errors=True)
            advance(_JOIN, finished=True)
        else:
            follow(_JOIN, [0])
        count, unreadable = distributed.broadcast_object((count, missing))
        if missing is not None:
            missing |= unreadable
        return count

    def _chunks(self, bad: dict[int, str]) -> Iterator[Embeddings]:
        """Yield the embeddings of all parts, in order and in the chunks of one process; add the unreadable images."""
        before = dict[str, int]()
        for name in self.sources:
            before[name] = sum(len(self.sources[other]) for other in before)
        for part in self.parts:
            vectors, index, unreadable = _load(part.file)
            bad |= {before[part.split] + i: why for i, why in unreadable.items()}
            source = self.sources[part.split]
            for at in part.numbers[::BATCH]:
                here = slice(*torch.searchsorted(index, torch.tensor([at, at + BATCH])).tolist())
                if here.start == here.stop:
                    continue
                yield Embeddings(
                    vectors=vectors[here],
                    labels=source.labels[index[here]].cpu(),
                    identities=tuple(source.identity(i) for i in index[here].tolist()),
                    index=index[here],
                    name=source.name,
                    feature="",
                    split=part.split,
                    classes=getattr(source, "classes", ()),
                    ids=getattr(source, "ids", None),
                )
            advance(_JOIN)


def digest(tensors: Mapping[str, Tensor], *more: object) -> str:
    """Return 64 hex digits that change with any number of the tensors, or with the text of anything else."""
    sha256 = hashlib.sha256(repr(more).encode(errors="surrogatepass"))
    for name, x in sorted(tensors.items()):
        sha256.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        sha256.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _save(file: Path, chunks: Sequence[Embeddings], bad: Mapping[int, str], tokens: Tokens | None) -> None:
    rows = [torch.from_numpy(numbers(chunk, tokens)) for chunk in chunks]
    vectors = torch.cat(rows) if chunks else torch.empty(0, 0)
    index = torch.cat([chunk.index for chunk in chunks]) if chunks else torch.empty(0, dtype=torch.long)
    content = save({"vectors": vectors, "index": index}, {"unreadable": json.dumps(bad)})
    with replacing(file) as opened:
        opened.write(content)


def _load(file: Path) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Return vectors, numbers of the images in their split, and the unreadable images of a part."""
    try:
        with safe_open(file, "pt") as opened:
            unreadable = json.loads(opened.metadata()["unreadable"])
            return opened.get_tensor("vectors"), opened.get_tensor("index"), {int(i): x for i, x in unreadable.items()}
    except OSError as error:
        raise InbatchError(
            f"{file}, which a rank has written, cannot be read on rank 0: {error.strerror or error}. Choose an output "
            "file on a disk that all machines share"
        ) from error


def _readable(file: Path) -> bool:
    """Return whether a part is there and complete."""
    try:
        with safe_open(file, "pt") as opened:
            return set(opened.keys()) == {"vectors", "index"} and "unreadable" in opened.metadata()
    except (OSError, SafetensorError):
        return False
