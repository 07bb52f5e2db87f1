"The C++ sources of the kernels, and the library that is built of them and loaded."
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from bnonly import native

ROOT = Path(__file__).parents[1]
MARCHES = "x86-64-v2", "x86-64-v3", "x86-64-v4", "sapphirerapids"   # the last has float16
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86")
needs_users = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners of files")


# The sources

def needs(program):
    if shutil.which(program) is None: pytest.skip(f"there is no {program} on this machine")


@needs_x86
@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_no_compiler_warns_of_the_sources(compiler, march):
    needs(compiler)
    flags = [*(flag for flag in native.FLAGS if flag != "-shared"), f"-march={march}", "-Werror"]   # nothing is linked
    command = [compiler, *flags, "-fsyntax-only", native.CSRC / "kernels.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_optimizer_of_gcc_does_not_warn_either():
    "What it alone sees, such as numbers that may be read before they are written. Built once, then in the cache."
    needs("g++")
    assert native.compile_library("g++", ("-Werror",)).exists()


def test_the_sources_are_formatted():
    needs("clang-format")
    files = sorted(native.CSRC.iterdir())
    done = subprocess.run(["clang-format", "--dry-run", "-Werror", *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and len(files) > 5, done.stderr


def test_python_passes_the_arguments_that_the_functions_have():
    "ctypes checks no signature, so the header is read."
    kinds = {"double": native.D, "long": native.L, "int": native.I}
    text = (native.CSRC / "exports.h").read_text()
    found = {
        name: (result, [native.P if "*" in a else kinds[a.split()[0]] for a in arguments.split(",")])
        for result, name, arguments in re.findall(r"(?m)^(\w+) NAME\((\w+)\)\(([^)]+)\)", text)
    }
    assert {name: arguments for name, (_, arguments) in found.items()} == native.ARGUMENTS
    assert {name for name, (result, _) in found.items() if result == "float"} == {"pack_winograd", "pack_direct"}


# The library's name and place

@pytest.fixture
def compiler(tmp_path, monkeypatch):
    "A compiler that writes an empty library and says the version in the file beside it."
    monkeypatch.setenv("BNONLY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "version").write_text("compiler 1.0\nand its licence")
    script = tmp_path / "compiler"
    script.write_text('''#!/bin/sh
for last; do :; done
if [ "$last" = --version ]; then cat "${0%/*}/version"; else : > "$last"; fi
''')
    script.chmod(0o755)
    return str(script)


def test_another_compiler_or_version_gives_another_library(compiler, tmp_path):
    first, again = (native.compile_library(compiler) for _ in "ab")
    (tmp_path / "version").write_text("compiler 1.1\nand its licence")
    names = {first, native.compile_library(compiler), native.compile_library(f"env {compiler}"),
             native.compile_library(compiler, ("-g",))}
    assert first == again and len(names) == 4
    assert sorted(first.parent.iterdir()) == sorted(names)   # and nothing else is left there


@needs_users
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000])
def test_folder_and_library_are_their_users_alone(compiler, tmp_path, umask):
    "Whatever the umask, and where a cache is shared or comes from a version that let a group write."
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    before = os.umask(umask)
    try: library = native.compile_library(compiler)
    finally: os.umask(before)
    assert library == native.compile_library(compiler)
    assert [path.stat().st_mode & 0o777 for path in (library.parent, library)] == [0o700, 0o700]


@needs_users
@pytest.mark.parametrize("of", ["folder", "library"])
@pytest.mark.parametrize("fault", ["a group writes", "everybody writes", "another owns"])
def test_what_others_could_change_is_not_loaded(compiler, monkeypatch, caplog, of, fault):
    library = native.compile_library(compiler)
    path = library if of == "library" else library.parent
    if fault != "another owns": path.chmod(0o720 if fault == "a group writes" else 0o702)
    elif os.geteuid() == 0: os.chown(path, 12345, -1)
    else: pytest.skip("only root can give a file to another user")
    answer = "belongs to another user (uid 12345)" if fault == "another owns" else f"others may write to {path}"
    with pytest.raises(RuntimeError, match=re.escape(answer) + ".*set BNONLY_CACHE"): native.compile_library(compiler)
    monkeypatch.setenv("CXX", compiler)
    caplog.clear()
    assert native.kernels.__wrapped__() is None
    assert len(caplog.messages) == 1 and "no compiled kernels (" in caplog.text and answer in caplog.text


@pytest.mark.parametrize("compiler", ["no-such-compiler", "'no-such-compiler"])   # the second has one quote
def test_who_insists_on_kernels_is_told_that_there_are_none(compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("BNONLY_KERNELS", "fused")
    with pytest.raises(RuntimeError, match="BNONLY_KERNELS 'fused' is not possible .*no-such-compiler.*say 'plain'"):
        native.kernels.__wrapped__()


@needs_users
def test_root_and_the_user_may_own_a_library(tmp_path, monkeypatch):
    "Seen from another user's process, so that it can be tested without being root."
    native.check_private(tmp_path)
    if owner := os.geteuid():
        monkeypatch.setattr(native.os, "geteuid", lambda: owner + 1)
        with pytest.raises(RuntimeError, match=f"belongs to another user .uid {owner}"): native.check_private(tmp_path)
    native.check_private(Path("/"))
