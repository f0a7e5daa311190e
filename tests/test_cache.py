"""The store on disk: what was put is what is got, or a miss; whatever happens to its files and its folder."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.runtime import atomic
from graphwright.runtime import cache as cache_module
from graphwright.runtime.cache import Cache, default_cache

KEY = {"program": "5e1f", "device": "cpu", "torch": "2.13.0"}
VALUE = b"16 slices of 64 rows"


def files(cache):
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def only_file(cache):
    (path,) = files(cache)
    return path


def in_a_process(code, *arguments):
    source = "import sys\nfrom pathlib import Path\nfrom graphwright.runtime.cache import Cache\ncache = Cache(Path(sys.argv[1]))\n"
    command = [sys.executable, "-c", source + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# --- keys and values -------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(key=st.dictionaries(st.text(), st.text()), value=st.binary())
def test_what_was_put_is_got_under_the_same_key_by_any_process(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("cache")
    Cache(folder).put("tuning", key, value)
    assert Cache(folder).get("tuning", dict(reversed(key.items()))) == value


def test_a_key_that_differs_in_a_value_a_name_or_a_part_and_another_kind_are_misses(cache):
    cache.put("tuning", KEY, VALUE)
    assert cache.get("tuning", KEY | {"torch": "2.11.0"}) is None
    assert cache.get("tuning", KEY | {"threads": "2"}) is None
    assert cache.get("tuning", {"program": "5e1f", "gpu": "cpu", "torch": "2.13.0"}) is None
    assert cache.get("probe", KEY) is None


def test_the_last_value_put_is_the_one_that_is_got(cache):
    cache.put("tuning", KEY, VALUE)
    cache.put("tuning", KEY, b"8 slices")
    assert cache.get("tuning", KEY) == b"8 slices" and len(files(cache)) == 1


@pytest.mark.parametrize("kind", ["", "Tuning", "../tuning", "a/b", "tuning\n", ".."])
def test_a_kind_that_is_no_short_name_is_an_error(cache, kind):
    for use in (lambda: cache.get(kind, KEY), lambda: cache.put(kind, KEY, VALUE)):
        with pytest.raises(gw.InputError, match="an entry's kind is .*: use lower case letters"):
            use()


# --- damage ----------------------------------------------------------------------------------------------------------------


def test_an_entry_with_any_byte_flipped_is_a_miss_and_can_be_put_again(cache):
    cache.put("tuning", KEY, VALUE)
    path = only_file(cache)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert cache.get("tuning", KEY) is None, f"byte {at}"
    cache.put("tuning", KEY, VALUE)
    assert cache.get("tuning", KEY) == VALUE


def test_an_entry_cut_off_anywhere_or_with_bytes_added_is_a_miss(cache):
    cache.put("tuning", KEY, VALUE)
    path = only_file(cache)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert cache.get("tuning", KEY) is None, f"{length} bytes"
    path.write_bytes(whole + b"\0")
    assert cache.get("tuning", KEY) is None


@pytest.mark.parametrize("header", [b"5", b"[]", b'{"kind": "passes"}', b'{"kind": "passes", "key": 5}', b'{"kind": 5, "key": {}}',
                                    b'{"kind": "passes", "key": {"n": [1]}}'])  # fmt: skip
def test_an_entry_that_its_digest_fits_and_whose_header_is_none_is_not_listed(cache, header):
    cache.put("passes", {"n": "1"}, b"value")
    path = only_file(cache)
    body = header + b"\n" + b"value"
    path.write_bytes(b"graphwright cache 1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    assert cache.entries() == [] and cache.nearest("passes", {"n": "2"}) is None and cache.get("passes", {"n": "1"}) is None


def test_an_entry_in_the_place_of_another_is_a_miss(cache):
    cache.put("tuning", KEY, VALUE)
    first = only_file(cache)
    cache.put("tuning", KEY | {"device": "cuda"}, b"for another device")
    (second,) = set(files(cache)) - {first}
    os.replace(second, first)
    assert cache.get("tuning", KEY) is None


@pytest.mark.parametrize("other", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["folder", "pipe", "link"])
def test_what_is_no_file_in_the_place_of_an_entry_is_a_miss(cache, other):
    cache.put("tuning", KEY, VALUE)
    path = only_file(cache)
    path.unlink()
    other(path)
    assert cache.get("tuning", KEY) is None
    cache.put("tuning", KEY, VALUE)  # does not raise


def test_damaged_entries_are_not_listed_and_are_cleared(cache):
    cache.put("tuning", KEY, VALUE)
    for name, content in (("empty", b""), ("text", b"graphwright cache 1 \n[]\n"), ("other", b"\xff\n{")):
        (cache.folder / "tuning" / name).write_bytes(content)
    assert [entry.key for entry in cache.entries()] == [KEY]
    assert cache.clear() == 4 and files(cache) == []


# --- disks and folders -----------------------------------------------------------------------------------------------------


def test_on_a_full_disk_the_result_is_not_kept_and_what_was_there_stays(cache, monkeypatch):
    cache.put("tuning", KEY, VALUE)

    @contextmanager
    def full(path, mode):
        with atomic.atomic_write(path, mode):
            yield Full()

    class Full:
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "atomic_write", full)
    cache.put("tuning", KEY, b"does not fit")
    cache.put("tuning", KEY | {"device": "cuda"}, b"does not fit")
    assert cache.get("tuning", KEY) == VALUE and len(files(cache)) == 1


def test_on_a_disk_of_a_few_pages_that_fills_up_nothing_is_lost_or_wrong(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {mounted.stderr.strip()}")
    try:
        cache = Cache(disk)
        values = {n: bytes([n]) * 10_000 for n in range(12)}
        for n, value in values.items():
            cache.put("tuning", {"n": str(n)}, value)
        got = {n: cache.get("tuning", {"n": str(n)}) for n in values}
        kept = {n for n, value in got.items() if value is not None}
        assert 0 < len(kept) < 12 and all(got[n] == values[n] for n in kept)
        assert not [path for path in files(cache) if path.name.endswith(".tmp")]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_keeps_nothing_and_raises_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/cache")):
        cache = Cache(folder)
        cache.put("tuning", KEY, VALUE)
        assert cache.get("tuning", KEY) is None and cache.entries() == [] and cache.clear() == 0
    assert Cache(tmp_path / "file" / "cache").problem == f"{tmp_path / 'file'} cannot be written"


def test_folders_and_files_are_made_for_the_user_alone(tmp_path):
    cache = Cache(tmp_path / "a" / "b")
    before = os.umask(0)
    try:
        cache.put("tuning", KEY, VALUE)
    finally:
        os.umask(before)
    assert oct(only_file(cache).stat().st_mode & 0o777) == "0o600" and cache.get("tuning", KEY) == VALUE
    assert {oct((tmp_path / name).stat().st_mode & 0o777) for name in ("a", "a/b", "a/b/tuning")} == {"0o700"}


# --- trust -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "..", "tuning"])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_is_not_trusted(tmp_path, where, mode):
    cache = Cache(tmp_path / "parent" / "cache")
    cache.put("tuning", KEY, VALUE)
    (cache.folder / where).resolve().chmod(mode)
    assert cache.get("tuning", KEY) is None
    cache.put("tuning", KEY, b"new")
    (cache.folder / where).resolve().chmod(0o700)
    assert cache.get("tuning", KEY) == VALUE


def test_a_sticky_folder_is_trusted_above_entries_and_not_as_the_one_that_they_lie_in(cache):
    cache.put("tuning", KEY, VALUE)
    cache.folder.chmod(0o1777)
    assert cache.get("tuning", KEY) == VALUE and cache.problem is None
    (cache.folder / "tuning").chmod(0o1777)
    assert cache.get("tuning", KEY) is None


def test_an_entry_that_others_may_write_is_a_miss(cache):
    cache.put("tuning", KEY, VALUE)
    only_file(cache).chmod(0o666)
    assert cache.get("tuning", KEY) is None
    cache.put("tuning", KEY, VALUE)
    assert cache.get("tuning", KEY) == VALUE


@pytest.mark.parametrize("where", [".", "tuning", ".."])
def test_what_belongs_to_another_user_is_not_trusted(tmp_path, where):
    if os.geteuid() != 0:
        pytest.skip("giving a folder away needs root")
    cache = Cache(tmp_path / "parent" / "cache")
    cache.put("tuning", KEY, VALUE)
    os.chown(cache.folder / where, 65534, -1)
    assert cache.get("tuning", KEY) is None


def test_an_entry_of_another_user_is_a_miss(cache):
    if os.geteuid() != 0:
        pytest.skip("giving a file away needs root")
    cache.put("tuning", KEY, VALUE)
    os.chown(only_file(cache), 65534, -1)
    assert cache.get("tuning", KEY) is None


def test_the_problem_says_why_nothing_is_kept(tmp_path):
    cache = Cache(tmp_path / "cache")
    assert cache.problem is None and not cache.folder.exists()
    cache.put("tuning", KEY, VALUE)
    assert cache.problem is None
    cache.folder.chmod(0o777)
    assert (
        cache.problem == f"{cache.folder} can be written by others: take their permission away (chmod go-w), or set GRAPHWRIGHT_CACHE_DIR"
    )


# --- several processes -----------------------------------------------------------------------------------------------------


def test_a_writer_killed_at_any_point_leaves_the_old_entry_or_the_new_one(cache):
    """Stops the writer before each system call that it makes through `os`, and kills it there. Writers are forks of one process, which
    imports once."""
    code = """
    import itertools, os, signal
    def stopping(function, calls, last):
        def stop(*arguments, **keywords):
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return stop
    def write(last):
        calls = itertools.count()
        for name in ("open", "fsync", "replace", "fdopen", "fchmod"):
            setattr(os, name, stopping(getattr(os, name), calls, last))
        cache.put("tuning", {"n": "1"}, b"new")
    for line in sys.stdin:
        writer = os.fork()
        if writer == 0:
            write(int(line))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]), flush=True)
    """
    key = {"n": "1"}
    seen, at = set(), 0
    with in_a_process(code, cache.folder) as writers:
        while True:
            cache.put("tuning", key, b"old")
            print(at, file=writers.stdin, flush=True)
            ended = int(writers.stdout.readline())
            assert cache.get("tuning", key) in (b"old", b"new")
            seen.add(cache.get("tuning", key))
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            at += 1
    assert at >= 5 and seen == {b"old", b"new"}
    assert len(files(cache)) == 1, "what killed writers left is removed"


def test_what_a_killed_writer_of_another_entry_left_is_removed(cache):
    cache.put("tuning", KEY, VALUE)
    left = cache.folder / "tuning" / f".abc.{atomic._boot()}-999999999-ab.tmp"
    left.write_bytes(b"half")
    Cache(cache.folder).put("tuning", KEY | {"device": "cuda"}, VALUE)  # as another process would
    assert not left.exists()


def test_two_writers_and_a_reader_at_once_see_whole_values(cache):
    code = """
    for n in range(40):
        cache.put("tuning", {"n": str(n % 3)}, sys.argv[2].encode() * 50_000)
    """
    writers = [in_a_process(code, cache.folder, letter) for letter in "ab"]
    whole = {None, b"a" * 50_000, b"b" * 50_000}
    while any(writer.poll() is None for writer in writers):
        assert {cache.get("tuning", {"n": str(n)}) for n in range(3)} <= whole
    assert [writer.wait() for writer in writers] == [0, 0]
    assert {cache.get("tuning", {"n": str(n)}) for n in range(3)} <= whole - {None}
    assert len(files(cache)) == 3


# --- size ------------------------------------------------------------------------------------------------------------------


def put_at(cache, n, time):
    """Puts entry `n` of 1,000 bytes as though it were last used at `time`."""
    before = set(files(cache))
    cache.put("tuning", {"n": str(n)}, bytes(1000))
    for path in set(files(cache)) - before:
        os.utime(path, (time, time))


def test_beyond_its_size_the_cache_gives_up_what_was_not_used_for_longest(tmp_path):
    cache = Cache(tmp_path / "cache", max_bytes=4000)
    for n in range(3):
        put_at(cache, n, 100 + n)
    assert cache.get("tuning", {"n": "0"}) is not None  # used now: the last of all
    put_at(cache, 3, 200)
    put_at(cache, 4, 300)
    assert sorted(entry.key["n"] for entry in cache.entries()) == ["0", "3", "4"]
    assert sum(path.stat().st_size for path in files(cache)) <= 4000


def test_all_kinds_share_the_size(tmp_path):
    cache = Cache(tmp_path / "cache", max_bytes=2500)
    for kind in ("passes", "code", "tuning"):
        cache.put(kind, KEY, bytes(1000))
    assert len(files(cache)) == 2


def test_a_value_larger_than_the_cache_is_not_kept_and_moves_nothing_out(tmp_path):
    cache = Cache(tmp_path / "cache", max_bytes=2000)
    cache.put("tuning", KEY, VALUE)
    cache.put("passes", KEY, bytes(2000))
    assert cache.get("passes", KEY) is None and cache.get("tuning", KEY) == VALUE


def test_a_reader_reads_an_entry_whole_that_is_evicted_meanwhile(cache, monkeypatch):
    cache.put("tuning", KEY, VALUE)
    opened = cache_module._opened

    def evicted(path):
        file = opened(path)
        path.unlink()
        return file

    monkeypatch.setattr(cache_module, "_opened", evicted)
    assert cache.get("tuning", KEY) == VALUE
    assert cache.get("tuning", KEY) is None


# --- looking inside --------------------------------------------------------------------------------------------------------


def test_entries_are_listed_with_their_keys_the_last_used_first(cache):
    put_at(cache, 0, 200)
    put_at(cache, 1, 100)
    cache.put("probe", KEY, VALUE)
    assert [(entry.kind, entry.key) for entry in cache.entries()] == [("probe", KEY), ("tuning", {"n": "0"}), ("tuning", {"n": "1"})]
    assert [entry.used for entry in cache.entries("tuning")] == [200, 100]
    assert all(1000 < entry.nbytes < 1300 for entry in cache.entries("tuning"))


def test_the_nearest_entry_explains_a_miss(cache):
    cache.put("tuning", KEY, VALUE)
    cache.put("tuning", KEY | {"program": "other", "device": "cuda"}, VALUE)
    cache.put("probe", KEY | {"device": "tpu"}, VALUE)
    asked = KEY | {"torch": "2.11.0", "threads": "2"}
    nearest = cache.nearest("tuning", asked)
    assert nearest.key == KEY
    assert nearest.differing(asked) == {"torch": ("2.13.0", "2.11.0"), "threads": (None, "2")}
    assert cache.nearest("passes", asked) is None


def test_one_kind_is_cleared_and_the_others_stay(cache):
    cache.put("tuning", KEY, VALUE)
    cache.put("probe", KEY, VALUE)
    assert cache.clear("tuning") == 1
    assert cache.get("tuning", KEY) is None and cache.get("probe", KEY) == VALUE


# --- the user's cache ------------------------------------------------------------------------------------------------------


def test_the_default_folder_is_the_users_and_is_read_when_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("GRAPHWRIGHT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache().folder == tmp_path / ".cache" / "graphwright"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache().folder == tmp_path / ".cache" / "graphwright"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache().folder == tmp_path / "xdg" / "graphwright"
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_DIR", str(tmp_path / "own"))
    assert default_cache().folder == tmp_path / "own"


def test_entries_are_not_all_looked_at_for_each_that_is_put(tmp_path, monkeypatch):
    cache = Cache(tmp_path / "cache", max_bytes=2**20)
    looks = []
    files_of = Cache._files
    monkeypatch.setattr(Cache, "_files", lambda self: looks.append(1) or files_of(self))
    for n in range(100):
        cache.put("tuning", {"n": str(n)}, b"x" * 100)
    assert len(looks) <= 2
    for n in range(40):
        cache.put("code", {"n": str(n)}, b"x" * 2**15)
    assert sum(path.stat().st_size for path in files_of(cache)) <= 2**20
