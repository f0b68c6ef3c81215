"""From a source to an encoded set: units dealt out to tasks, each done once, and published when the last is.

Tasks share nothing but the folder DST.partial:

    plan.json    what is encoded, and how; a task with another plan is refused
    set/         the shards that are whole, and at the end everything else; renamed to DST
    records/     one small file a unit, written after its shards: a unit with a record is never done again
    drafts/      what is being written, under names that are never met again

So a task may be killed at any moment, and any task may do what another one left; who finds all records there
publishes, and where several do, the first rename counts and the others find the set in its place.
"""

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ecdit_ds.data.latents.columns import DTYPES, null_columns, sum_stats
from ecdit_ds.data.latents.index import (
    INDEX_FILE,
    REPORT_FILE,
    SCHEMA_VERSION,
    LatentIndex,
    ShardInfo,
    read_index,
)
from ecdit_ds.data.latents.shard_writer import commit_dataset, write_index, write_null_text
from ecdit_ds.data.precompute.unit import MAX_NAMES, EncodeSettings, UnitRecord, encode_unit, read_record, smallest_of
from ecdit_ds.data.sources.bad_sample import UNCOUNTABLE, WAYS_OUT
from ecdit_ds.data.sources.base import ImageSource
from ecdit_ds.data.sources.images import DECODING
from ecdit_ds.errors import DataError
from ecdit_ds.files.durable import make_folders, put_on_disk, write_durably

_OF_SOURCE = ("fingerprint", "units")
"""What of a plan differs where the source has changed."""
_LEAST_JUDGED = 1000
"""Samples that a task has looked at before it may stop in the middle because too many are bad."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeJob:
    """What to encode, where to, and which part of it."""

    source: ImageSource
    destination: Path
    encoding: EncodeSettings
    image_facts: Mapping[str, Any]
    """What the image encoder is loaded again by; with `identity`."""
    text_facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    """What else the samples depend on."""
    task: int = 0
    tasks: int = 1
    max_bad: float = 0.05
    accepts_cut: bool = False
    """Whether to publish although archives have lost samples that nobody can count."""

    @property
    def partial(self) -> Path:
        """The folder that tasks share until the set is whole."""
        return self.destination.with_name(self.destination.name + ".partial")

    @property
    def plan(self) -> dict[str, Any]:
        """What all tasks must agree on."""
        return {
            "schema": SCHEMA_VERSION,
            "source": self.source.kind,
            "fingerprint": self.source.fingerprint,
            "units": len(self.source.units),
            "image_encoder": self.image_facts["identity"],
            "text_encoder": self.text_facts["identity"],
            "sizes": [list(size) for size in self.encoding.sizes],
            "dtype": self.encoding.dtype,
            "has_text": self.encoding.has_text,
            "decoding": DECODING,
            "batch_size": self.encoding.batch_size,
            **self.settings,
        }


def encode_corpus(job: PrecomputeJob, *, moment: Callable[[str], None] = lambda name: None) -> dict[str, Any] | None:
    """Do this task's units, and publish the set where all are done.

    Args:
        moment: told what comes next, for tests of what a kill leaves behind.

    Returns:
        The report, as `report.json` has it; None where other tasks have units left.

    Raises:
        DataError: the place is taken by something else, the disk is full, or more samples are bad than allowed.
    """
    if not 0 <= job.task < job.tasks:
        raise DataError(f"--task {job.task}/{job.tasks}: tasks count from 0; choose 0 to {job.tasks - 1}")
    try:
        if _is_published(job):
            return _published_report(job)
        for name in ("set", "records", "drafts"):
            make_folders(job.partial / name)
        moment("plan")
        if _is_published(job):  # by another task, just now
            return _published_report(job)
        _agree(job)
        _do_units(job, moment)
        return _publish(job, moment)
    except OSError as error:
        if _is_published(job):  # by another task, while this one did again what that one had done
            return _published_report(job)
        raise DataError(
            f"{job.partial}: cannot be written ({error.strerror or error}); free space or mend it, and give the same "
            "command: it goes on where it was"
        ) from None


def _is_published(job: PrecomputeJob) -> bool:
    """Return whether the set is in its place.

    Raises:
        DataError: something else is there.
    """
    if not job.destination.exists():
        return False
    if not (job.destination / INDEX_FILE).is_file():
        raise DataError(f"{job.destination}: is there and is no encoded set; name another place, or move it away")
    plan = dict(read_index(job.destination).settings)
    # A set that an earlier version made whole stays what it is.
    _compare(plan, job.plan | {"decoding": plan.get("decoding")}, job.destination, "holds another set")
    return True


def _published_report(job: PrecomputeJob) -> dict[str, Any]:
    shutil.rmtree(job.partial, ignore_errors=True)  # what a task that was killed after publishing left
    report: dict[str, Any] = json.loads((job.destination / REPORT_FILE).read_bytes())
    return report


def _agree(job: PrecomputeJob) -> None:
    """Write the plan, or check that it is the one that is there; the first of several tasks writes it."""
    path = job.partial / "plan.json"
    if not path.exists():
        draft = job.partial / "drafts" / f"{uuid.uuid4().hex}.json"
        write_durably(draft, json.dumps(job.plan, indent=1).encode("ascii"))
        with suppress(FileExistsError):
            os.link(draft, path)  # unlike a rename, it never replaces
        put_on_disk(job.partial)
        draft.unlink()
    try:
        there = json.loads(path.read_bytes())
    except ValueError:
        there = {}
    _compare(there, job.plan, job.partial, "was begun with other settings")


def _compare(there: dict[str, Any], plan: dict[str, Any], place: Path, message: str) -> None:
    wanted = json.loads(json.dumps(plan))
    different = [name for name in sorted({*there, *wanted}) if there.get(name) != wanted.get(name)]
    others = [name for name in different if name not in _OF_SOURCE]
    if different and not others:
        raise DataError(
            f"{place}: the source has changed since it was begun; restore the source (names, sizes and times of its "
            "files), or name another place, or delete that one to encode anew"
        )
    if others:
        name = others[0]
        raise DataError(
            f"{place}: {message} ({name}: {there.get(name)}, not {wanted.get(name)}); name another place, or delete "
            "that one"
        )


def _do_units(job: PrecomputeJob, moment: Callable[[str], None]) -> None:
    """Encode those of this task's units that have no record yet.

    Raises:
        DataError: more samples are bad than allowed, as soon as enough were looked at to say so.
    """
    units = range(job.task, len(job.source.units), job.tasks)
    sizes = [job.source.units[i].stop - job.source.units[i].start for i in units]
    total = None if any(size < 0 for size in sizes) else sum(sizes)
    done: list[UnitRecord] = []
    bad = seen = 0
    # disable=None shows the bar on terminals only.
    with tqdm(total=total, desc="encoding", unit="sample", disable=None) as progress:
        for i in units:
            record = _whole_record(job, i)
            if record is None:
                moment("unit")
                encode_unit(
                    i,
                    job.source.read(job.source.units[i]),
                    job.encoding,
                    shards=job.partial / "set",
                    drafts=job.partial / "drafts",
                    records=job.partial / "records",
                    moment=moment,
                    tell=progress.update,
                )
                record = _whole_record(job, i)
            else:
                progress.update(record.count + record.num_bad)
            if record is None:  # another task has published the set, and cleared this away
                return
            done.append(record)
            bad, seen = bad + record.num_bad, seen + record.num_bad + record.count
            if seen >= _LEAST_JUDGED and bad > job.max_bad * seen:
                _check_share(_report_of(done, {}), job)


def _whole_record(job: PrecomputeJob, unit: int) -> UnitRecord | None:
    """Return a unit's record if all its shards are there in full size."""
    record = read_record(job.partial / "records" / f"{unit:05d}.json")
    if record is None:
        return None
    for shard in record.shards:
        path = job.partial / "set" / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            return None
    return record


def _publish(job: PrecomputeJob, moment: Callable[[str], None]) -> dict[str, Any] | None:
    """Write what belongs to the whole set and rename it to its place, if all units are done."""
    records_there = job.partial / "records"
    # Counted before any is read: most of many tasks end here.
    if not records_there.is_dir() or len(os.listdir(records_there)) < len(job.source.units):
        return _published_report(job) if _is_published(job) else None
    found = [_whole_record(job, i) for i in range(len(job.source.units))]
    records = [record for record in found if record is not None]
    if len(records) < len(found):
        return _published_report(job) if _is_published(job) else None
    report = _report_of(records, job.source.ignored)
    if job.source.revision:
        report["source_revision"] = job.source.revision
    _check_share(report, job)
    _check_archives(report, job)
    folder = job.partial / "set"
    moment("index")
    # Several tasks may be here at once: each writes beside, and all write the same.
    draft = job.partial / "drafts" / uuid.uuid4().hex
    draft.mkdir()
    moment("null text")
    # Rounded as the captions' vectors are: those that are made beside training are not.
    null_text = null_columns(
        job.encoding.text_encoder, DTYPES[job.encoding.dtype if job.encoding.has_text else "float32"]
    )
    facts = write_null_text(draft, null_text)
    write_durably(draft / REPORT_FILE, (json.dumps(report, indent=2) + "\n").encode("ascii"))
    write_index(draft, _index_of(job, records, facts, null_text["text_pooled"].shape[1]))
    for path in sorted(draft.iterdir()):
        moment("part")
        path.rename(folder / path.name)
    put_on_disk(folder)
    moment("publish")
    commit_dataset(folder, job.destination)
    moment("clear")
    shutil.rmtree(job.partial, ignore_errors=True)
    return report


def _report_of(records: Sequence[UnitRecord], ignored: Mapping[str, int]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    for record in records:
        counts.update(record.bad_counts)
        for cause, some in record.bad_names.items():
            known = names.setdefault(cause, [])
            known += some[: MAX_NAMES - len(known)]
    converted = sum((Counter(record.converted) for record in records), Counter())
    ignored = sum((Counter(record.ignored) for record in records), Counter(ignored))
    good = sum(record.count for record in records)
    smallest = smallest_of(record.smallest for record in records)
    return {
        "samples": good,
        "left_out": sum(counts.values()),
        "causes": {cause: {"count": counts[cause], "names": names[cause]} for cause in sorted(counts)},
        "converted": dict(sorted(converted.items())),
        "ignored_files": dict(sorted(ignored.items())),
    } | ({"smallest_enlarged": list(smallest)} if smallest else {})


def _check_share(report: Mapping[str, Any], job: PrecomputeJob) -> None:
    bad, total = report["left_out"], report["left_out"] + report["samples"]
    worst = max(report["causes"].items(), key=lambda item: item[1]["count"], default=None)
    most = f", most for: {worst[0]} ({worst[1]['count']}, such as {worst[1]['names'][0]})" if worst else ""
    most += f"; {WAYS_OUT[worst[0]]}" if worst and worst[0] in WAYS_OUT else ""
    if total == 0 or bad == total:
        ignored = report["ignored_files"]
        kinds = ", ".join(f"{kind!r}: {count}" for kind, count in Counter(ignored).most_common(5))
        unseen = f"; {sum(ignored.values())} files were not looked at, most: {kinds}" if ignored else ""
        raise DataError(f"{job.destination}: no sample of {total} is usable{most}{unseen}; nothing was published")
    if bad / total > job.max_bad:
        raise DataError(
            f"{job.destination}: {bad} of {total} samples are bad ({bad / total:.1%}), more than --max-bad "
            f"{job.max_bad:g}{most}; nothing was published: give the same command with a higher --max-bad, or mend "
            f"them, delete {job.partial} and encode anew"
        )


def _check_archives(report: Mapping[str, Any], job: PrecomputeJob) -> None:
    """Refuse archives that have lost samples which no share can count, all at once."""
    lost = [facts for cause, facts in report["causes"].items() if cause in UNCOUNTABLE]
    if not lost or job.accepts_cut:
        return
    names = [name for facts in lost for name in facts["names"]]
    count = sum(facts["count"] for facts in lost)
    shown = ", ".join(names) + (", ..." if count > len(names) else "")
    raise DataError(
        f"{job.destination}: {count} archives end early or cannot be read ({shown}); how many samples are lost is not "
        f"known, so nothing was published: delete {job.partial} and encode anew once they are whole, or publish what "
        "is left by --accept-cut-archives"
    )


def _index_of(
    job: PrecomputeJob, records: Sequence[UnitRecord], facts: Mapping[str, Any], pooled_width: int
) -> LatentIndex:
    shapes = {bucket: shape for record in records for bucket, shape in record.latents_shapes.items()}
    used = sorted(shapes)
    shards = tuple(
        ShardInfo(**(vars(shard) | {"bucket": used.index(shard.bucket)}))
        for record in records
        for shard in record.shards
    )
    mean, std = sum_stats(record.sums for record in records).statistics()
    text = job.encoding.text_encoder
    return LatentIndex(
        schema=SCHEMA_VERSION,
        count=sum(shard.count for shard in shards),
        image_encoder=job.image_facts,
        text_encoder=job.text_facts,
        latents_dtype=job.encoding.dtype,
        text_shape=(text.max_tokens, text.embed_dim),
        pooled_width=pooled_width,
        has_text=job.encoding.has_text,
        buckets=tuple((shapes[bucket][0], shapes[bucket][1], shapes[bucket][2]) for bucket in used),
        shards=shards,
        latents_mean=mean,
        latents_std=std,
        settings=job.plan,
        **facts,
    )
