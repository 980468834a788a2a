"""Writing of files and folders: complete or not at all, with the umask's modes, and nothing left over."""

import json
import os
import stat
from pathlib import Path

import pytest

from itt_composer.atomic import atomic_folder, remove_leftovers, write_json, write_text


@pytest.mark.parametrize(('umask', 'file_mode', 'folder_mode'), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_modes_follow_the_umask(tmp_path, umask, file_mode, folder_mode):
    before = os.umask(umask)
    try:
        write_text('x', tmp_path / 'file')
        write_json({'a': 1}, tmp_path / 'deep/file.json')
        with atomic_folder(tmp_path / 'folder', own=lambda there: False) as folder:
            (folder / 'inner').write_text('x')
    finally:
        os.umask(before)
    assert json.loads((tmp_path / 'deep/file.json').read_text()) == {'a': 1}
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob('*')}
    assert modes == {
        **dict.fromkeys(['file', 'file.json', 'inner'], file_mode),
        **dict.fromkeys(['deep', 'folder'], folder_mode),
    }


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text('old', tmp_path / 'file')

    def fail(descriptor):
        raise OSError('disk')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='disk'):
        write_text('new', tmp_path / 'file')
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']


def test_what_a_killed_writer_left_is_removed(tmp_path):
    if not (pid := os.fork()):
        with atomic_folder(tmp_path / 'out', own=lambda there: False) as folder:
            (folder / 'half').write_text('x')
            os._exit(9)
    os.waitpid(pid, 0)
    (tmp_path / '.hidden').write_text('of somebody else')
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['.hidden']


def own(folder):
    return (folder / 'weights').is_file()


def test_nothing_of_anybody_else_is_replaced(tmp_path, monkeypatch):
    (tmp_path / 'work' / 'inner').mkdir(parents=True)
    (tmp_path / 'work' / 'notes.txt').write_text('mine')
    for out, message in ((tmp_path / 'work', 'holds something else'), (tmp_path / 'work' / 'notes.txt', 'a file')):
        with pytest.raises(ValueError, match=message), atomic_folder(out, own):
            pass
    monkeypatch.chdir(tmp_path / 'work' / 'inner')
    for out in (Path('.'), Path('..')):
        with pytest.raises(ValueError, match='the working directory is in it'), atomic_folder(out, lambda _: True):
            pass
    assert (tmp_path / 'work' / 'notes.txt').read_text() == 'mine'
    for out, message in ((tmp_path / 'work', 'name a file'), (tmp_path / 'work' / 'notes.txt' / 'x', 'nothing can be')):
        with pytest.raises(ValueError, match=message):
            write_text('', out)
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['inner', 'notes.txt', 'work']


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    out, rename = tmp_path / 'out', os.replace
    with atomic_folder(out, own) as folder:
        (folder / 'weights').write_text('first')

    def fail_to_sync(descriptor):
        assert (out / 'weights').read_text() == 'first', 'lost by a kill'
        raise OSError('disk')

    def fail_to_rename(old, new):
        if (Path(old) / 'weights').read_text() == 'second':
            raise OSError('disk')
        rename(old, new)

    for name, fail in (('fsync', fail_to_sync), ('replace', fail_to_rename)):
        with monkeypatch.context() as patch, pytest.raises(OSError, match='disk'), atomic_folder(out, own) as folder:
            patch.setattr(os, name, fail)
            (folder / 'weights').write_text('second')
        assert (out / 'weights').read_text() == 'first' and list(tmp_path.iterdir()) == [out]


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / 'out'
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, own) as folder:
        (folder / 'weights').write_text('half')
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for text in ('first', 'second'):
        with atomic_folder(out, own) as folder:
            (folder / 'weights').write_text(text)
    with pytest.raises(OSError), atomic_folder(out, own):
        raise OSError
    assert (out / 'weights').read_text() == 'second' and list(tmp_path.iterdir()) == [out]
