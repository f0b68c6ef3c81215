"""A `.pt` file is read as data: nothing in it runs, nothing is held, damage and surprises are one line."""

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.pt_file import PtTensor, TorchFile, write_torch_file
from ecdit_ds.checkpoint.file_ranges import bytes_of
from ecdit_ds.errors import CheckpointError

RefusalOf = Callable[[Callable[[], object]], str]


class Writes:
    """Makes a file where it is unpickled by a careless reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


class Harmless:
    """Nothing, but of a class of its own."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


def test_every_part_of_every_tensor_is_read_as_it_was_written(path: Path) -> None:
    base = torch.randn(1000)
    content: dict[str, Any] = OrderedDict(
        whole=base,
        part=base[10:34].view(2, 3, 4),
        scalar=torch.tensor(3.5),
        brain=torch.randn(5, 7).bfloat16(),
        empty=torch.empty(0, 3),
        parameter=torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
        plain={"a": [1, 2.5, "text", None, True], 3: (torch.Size([1, 2]), torch.arange(4))},
    )
    write_torch_file(path, content)
    file = TorchFile(path)
    assert file.content["plain"]["a"] == [1, 2.5, "text", None, True]
    for name in ("whole", "part", "scalar", "brain", "empty", "parameter"):
        stored = file.content[name]
        assert (stored.dtype, stored.shape) == (content[name].dtype, tuple(content[name].shape))
        box = Box((0,) * len(stored.shape), stored.shape)
        assert torch.equal(file.read(stored, box), content[name]), name
        assert file.xxh3(stored) == xxhash.xxh3_64_hexdigest(bytes_of(content[name].detach()))
    assert torch.equal(file.read(file.content["part"], Box((1, 0, 2), (1, 2, 2))), content["part"][1:2, 0:2, 2:4])
    inner = file.read(file.content["whole"], Box((1, 1), (2, 3)), start=7, shape=(5, 6))
    assert torch.equal(inner, base[7:37].view(5, 6)[1:3, 1:4])
    assert file.content["plain"][3][0] == (1, 2)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_something_does_not(path: Path, refusal_of: RefusalOf, protocol: int) -> None:
    marker = path.with_name("marker")
    torch.save({"param": torch.ones(3), "evil": Writes(marker)}, path, pickle_protocol=protocol)
    message = refusal_of(lambda: TorchFile(path))
    assert str(path) in message and not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("call", [b"cbuiltins\nbytearray\n", b"c__builtin__\nbytearray\n"])
def test_a_pickle_takes_no_memory_that_its_bytes_do_not_pay_for(path: Path, refusal_of: RefusalOf, call: bytes) -> None:
    _write_with_pickle(path, b"\x80\x02" + call + b"\x8a\x08" + (2**62).to_bytes(8, "little") + b"\x85R.")
    assert "asks for bytearray" in refusal_of(lambda: TorchFile(path))
    doubled = b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R."
    _write_with_pickle(path, b"\x80\x02" + doubled)
    assert "asks for encode" in refusal_of(lambda: TorchFile(path))


def test_what_is_refused_is_named(path: Path, refusal_of: RefusalOf) -> None:
    torch.save({"args": Harmless()}, path)
    assert "Harmless" in refusal_of(lambda: TorchFile(path))
    torch.save({"a": [torch.ones(2, 2).to_sparse()]}, path)
    assert "a[0]" in refusal_of(lambda: TorchFile(path))
    torch.save({"a": {"b": 1j}}, path)
    assert "complex" in refusal_of(lambda: TorchFile(path))


def test_a_known_class_is_replaced_by_its_stand_in_and_only_while_that_file_is_read(path: Path) -> None:
    class StandIn:
        pass

    thing = Harmless()
    vars(thing).update(numel=3)
    torch.save([thing], path)
    (found,) = TorchFile(path, {f"{__name__}.Harmless": StandIn}).content
    assert type(found) is StandIn and vars(found) == {"numel": 3}
    with pytest.raises(CheckpointError):
        TorchFile(path)


def test_content_that_refers_to_itself_or_explodes_ends(path: Path) -> None:
    bomb: list[Any] = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    bomb.append(bomb)
    torch.save(bomb, path)
    assert len(TorchFile(path).content) == 3


def test_content_without_end_is_one_line(path: Path, refusal_of: RefusalOf) -> None:
    _write_with_pickle(path, b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".")
    assert str(path) in refusal_of(lambda: TorchFile(path))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_named(path: Path, refusal_of: RefusalOf, share: float) -> None:
    write_torch_file(path, {"param": torch.randn(100, 100)})
    os.truncate(path, int(path.stat().st_size * share))
    assert str(path) in refusal_of(lambda: TorchFile(path))


def test_no_flipped_bit_of_a_pickle_or_of_numbers_goes_by(path: Path, refusal_of: RefusalOf) -> None:
    values = torch.randn(256)
    write_torch_file(path, {"param": values})
    whole = path.read_bytes()
    messages, unseen = list[str](), 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            file = TorchFile(path)
            read = file.read(file.content["param"], Box((0,), (256,)))
        except CheckpointError as error:
            messages.append(str(error))
            continue
        assert torch.equal(read, values)  # a bit that nothing depends on: padding, a date
        unseen += 1
    assert all(str(path) in message and "\n" not in message for message in messages)
    assert 0 < unseen < len(messages)


def test_numbers_without_a_checksum_are_read(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"param": torch.arange(9.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    file = TorchFile(path)
    assert torch.equal(file.read(file.content["param"], Box((2,), (3,))), torch.arange(2.0, 5.0))


def test_a_tensor_may_not_reach_beyond_its_record_nor_lie_elsewhere(path: Path, refusal_of: RefusalOf) -> None:
    write_torch_file(path, {"param": torch.zeros(10)})
    with zipfile.ZipFile(path) as archive:
        text = archive.read("archive/data.pkl")
    assert text.count(b"K\x0a") == 2  # the storage's and the tensor's number of elements
    _rewrite(path, "data.pkl", text.replace(b"K\x0a", b"K\x7f"))
    assert "beyond its record" in refusal_of(lambda: TorchFile(path))


@pytest.mark.parametrize("fault", ["packed", "big", "old", "text"])
def test_what_is_no_such_file_is_one_line(path: Path, refusal_of: RefusalOf, fault: str) -> None:
    write_torch_file(path, {"param": torch.zeros(10)})
    if fault == "packed":
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in records.items():
                archive.writestr(name, data)
    elif fault == "big":
        _rewrite(path, "byteorder", b"big")
    elif fault == "old":
        torch.save({"param": torch.zeros(10)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_text("hello")
    assert str(path) in refusal_of(lambda: TorchFile(path))


def test_a_missing_file_and_a_tensor_in_pieces_are_one_line(path: Path, refusal_of: RefusalOf) -> None:
    assert "No such file" in refusal_of(lambda: TorchFile(path))
    write_torch_file(path, torch.zeros(4, 5).T)
    stored = TorchFile(path).content
    assert isinstance(stored, PtTensor)
    assert "in one piece" in refusal_of(lambda: TorchFile(path).read(stored, Box((0, 0), (5, 4))))


def test_opening_reads_no_numbers(path: Path) -> None:
    write_torch_file(path, {"param": torch.zeros(10_000_000)})
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("archive/data/0").header_offset
    data = bytearray(path.read_bytes())
    data[begin + 10_000_000] ^= 1
    path.write_bytes(data)
    file = TorchFile(path)
    assert math.prod(file.content["param"].shape) == 10_000_000
    with pytest.raises(CheckpointError, match="CRC32"):
        file.read(file.content["param"], Box((0,), (1,)))


def _rewrite(path: Path, record: str, data: bytes) -> None:
    """Replace a record, with a right checksum; the order of the records stays."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, old in records:
            archive.writestr(name, data if name.endswith(f"/{record}") else old)
    path.write_bytes(buffer.getvalue())


def _write_with_pickle(path: Path, text: bytes) -> None:
    write_torch_file(path, 1)
    _rewrite(path, "data.pkl", text)
    assert pickle.PROTO == b"\x80"


def test_a_file_is_known_by_its_name_its_time_and_its_content(path: Path) -> None:
    def identity(name: str = path.name, moment: int = 1, value: float = 1.0) -> str:
        write_torch_file(path.with_name(name), torch.full((3,), value))
        os.utime(path.with_name(name), ns=(moment, moment))
        return TorchFile(path.with_name(name)).identity

    assert identity() == identity()
    assert len({identity(), identity(name="y.pt"), identity(moment=2), identity(value=2.0)}) == 4


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("is_twice", "said"), [(True, "there twice"), (False, "overlap")])
def test_records_of_one_name_or_in_one_place_are_refused(
    path: Path, refusal_of: RefusalOf, is_twice: bool, said: str
) -> None:
    write_torch_file(path, torch.arange(1000.0))
    with zipfile.ZipFile(path, "a") as archive:
        (name,) = (name for name in archive.namelist() if "/data/" in name)
        if is_twice:
            archive.writestr(name, bytes(4000))
        else:  # the directory names the same bytes once more
            archive.writestr(f"{name[:-1]}9", b"")
            for fact in ("header_offset", "CRC", "file_size", "compress_size"):
                setattr(archive.getinfo(f"{name[:-1]}9"), fact, getattr(archive.getinfo(name), fact))
    assert said in refusal_of(lambda: TorchFile(path))


@pytest.mark.parametrize("chunk_bytes", [20, 48, 100])
def test_in_whatever_chunks_a_tensor_is_read_it_is_the_same_and_ends_where_it_ends(
    path: Path, refusal_of: RefusalOf, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    data = torch.arange(100.0).view(10, 10)
    write_torch_file(path, data)
    monkeypatch.setattr("ecdit_ds.checkpoint.file_ranges.CHUNK_BYTES", chunk_bytes)
    file = TorchFile(path)
    for box in (Box((0, 0), (10, 10)), Box((2, 3), (5, 4))):
        assert torch.equal(file.read(file.content, box), data[box.within((0, 0))])
    assert file.xxh3(file.content) == xxhash.xxh3_64_hexdigest(bytes_of(data))
    beyond = refusal_of(lambda: file.read(file.content, Box((0,), (1,)), start=1, shape=(100,)))
    assert "not stored in one piece" in beyond
