"""Compilers of all kinds: the fingerprints' loop is asked for, since nothing catches more than `NativeError` around it."""

import shutil
import tempfile

import pytest
import torch

from mnet_fx.arithmetic.kernels import c as native

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a compiler to wrap")
FAILS_AT_OPENMP = 'case "$*" in *-fopenmp*) for o in "$@"; do case "$o" in *.so) echo > "$o";; esac; done; exit 0;; esac; exec gcc "$@"'


@pytest.fixture
def script(tmp_path):
    """Writes a compiler, in a folder with a space in its name."""

    def write(body):
        path = tmp_path / "a folder" / "cc"
        path.parent.mkdir()
        path.write_bytes(b"#!/bin/sh\n" + body.encode("latin-1") + b"\n")
        path.chmod(0o755)
        return f"'{path}'"

    return write


def hashes(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    return native.hashes.__wrapped__()


@pytest.mark.parametrize("compiler", ["", " ", "env gcc", "env 'gcc' -DNAME=\"'a b'\""])
def test_the_variable_is_read_as_a_shell_reads_it(monkeypatch, compiler):
    assert hashes(monkeypatch, compiler)([torch.zeros(1)]) == native.hashes()([torch.zeros(1)])


@pytest.mark.parametrize("body", ['exec gcc "$@"', FAILS_AT_OPENMP], ids=["wrapper", "what OpenMP needs is missing"])
def test_a_compiler_that_works_somehow_will_do(monkeypatch, script, body):
    assert hashes(monkeypatch, script(body))([torch.ones(9)]) == native.hashes()([torch.ones(9)])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("printf 'F\xfcr nichts' >&2; exit 1", "r nichts"),
        ("exit 0", "cannot open shared object"),
        ('sed s/0x94D0/0x94D1/ | gcc "$@"', "other numbers"),
    ],
    ids=["another encoding", "writes nothing", "wrong code"],
)
def test_a_compiler_that_does_not_is_an_error_that_says_why(monkeypatch, script, body, words):
    with pytest.raises(native.NativeError, match=words):
        hashes(monkeypatch, script(body))


def test_quotes_that_do_not_match_are_an_error(monkeypatch):
    with pytest.raises(native.NativeError, match="closing quotation"):
        hashes(monkeypatch, "gcc '")


def test_a_compiler_that_hangs_is_stopped_and_not_asked_again(monkeypatch, script):
    monkeypatch.setattr(native, "_PATIENCE", 0.1)
    monkeypatch.setattr(native, "_HUNG", set())
    compiler = script("exec sleep 9")
    for words in ("it took more than", "it took too long before"):
        with pytest.raises(native.NativeError, match=words):
            hashes(monkeypatch, compiler)


def test_no_folder_to_write_to_is_an_error(monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(native.NativeError, match="read-only"):
        hashes(monkeypatch, "gcc")


def test_the_loop_is_tried_on_a_cpu_whatever_the_default_device_is():
    with torch.device("meta"):  # on CUDA, it would read the memory of a GPU, and the process would end
        assert native.hashes.__wrapped__() is not None
