"""A stranger's checkpoint runs no code, and writes no file that is not a tokenizer's."""

import os
import subprocess
import zipfile
from functools import partial
from io import BytesIO

import pytest
import torch

from itt_composer.export.checkpoint import read_checkpoint
from itt_composer.export.folder import export
from itt_composer.export.load import load_model
from itt_composer.export.unpickle import check_names


def pickled(module, name, argument, protocol):
    """The call of a global with one text, as a pickle."""
    if protocol == 2:
        return (
            f'\x80\x02c{module}\n{name}\nX'.encode()
            + len(argument).to_bytes(4, 'little')
            + f'{argument}\x85R.'.encode()
        )
    texts = [b'\x8c' + bytes([len(text)]) + text.encode() for text in (module, name, argument)]
    return b'\x80\x04' + texts[0] + texts[1] + b'\x93' + texts[2] + b'\x85R.'


def in_archive(data):
    """What ``torch.save`` would have written of that pickle."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in (('data.pkl', data), ('version', b'3\n'), ('byteorder', b'little')):
            archive.writestr(f'archive/{name}', content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ('module', 'name', 'protocol'),
    [
        ('posix', 'system', 2),
        ('subprocess', 'getoutput', 2),
        ('torch', 'os.system', 4),  # Only this protocol looks a name with a dot up in parts.
        ('torch.serialization', 'os.system', 4),
    ],
)
def test_a_checkpoint_runs_no_code(module, name, protocol, tmp_path):
    call = pickled(module, name, f'touch {tmp_path}/ran', protocol)
    (tmp_path / 'one.pt').write_bytes(in_archive(call))
    (tmp_path / 'shards').mkdir()
    (tmp_path / 'shards' / '.metadata').write_bytes(call)
    for path in (tmp_path / 'one.pt', tmp_path / 'shards'):
        for read in (read_checkpoint, partial(read_checkpoint, with_weights=False), load_model):
            with pytest.raises(ValueError, match=path.name) as error:
                read(path)
            assert '\n' not in str(error.value)
        with pytest.raises(ValueError, match=path.name):
            check_names(path)
    assert not (tmp_path / 'ran').exists()


def test_objects_of_other_classes_are_inert(checkpoint, tmp_path):
    """A stranger's callback may have a state of its own class; a call in its place is not made."""
    check_names(checkpoint)
    content = torch.load(checkpoint, weights_only=False)
    content['state']['callbacks'] = {'own': Call(subprocess.getoutput, f'touch {tmp_path}/ran')}
    torch.save(content, tmp_path / 'own.pt')
    assert read_checkpoint(tmp_path / 'own.pt').progress['token'] == 48
    with pytest.raises(ValueError, match=r'own.pt: reading it would call (subprocess|commands).getoutput'):
        check_names(tmp_path / 'own.pt')
    content['state']['callbacks'] = {'own': Call(os.system, f'touch {tmp_path}/ran')}
    torch.save(content, tmp_path / 'own.pt')
    with pytest.raises(ValueError, match=r'it names (posix|nt).system, which no checkpoint needs'):
        read_checkpoint(tmp_path / 'own.pt')
    assert not (tmp_path / 'ran').exists()


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, command):
        self.called = function, (command,)

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize('name', ['../out.json', '/tmp/out.json', '..', 'modeling_itt.py', 'a/b.json', '', 7])
def test_a_checkpoints_tokenizer_writes_tokenizer_files_only(name, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=False)
    content['state']['integrations']['huggingface']['tokenizer'][name] = {'content': '{}'}
    torch.save(content, tmp_path / 'own.pt')
    with pytest.raises(ValueError, match='expected tokenizer files, got one called'):
        export(tmp_path / 'own.pt', tmp_path / 'out')
    assert [path.name for path in tmp_path.iterdir()] == ['own.pt']


def test_what_a_checkpoint_says_of_code_is_not_exported(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=False)
    hugging_face = content['state']['integrations']['huggingface']
    hugging_face['model']['config']['content']['custom_pipelines'] = {'text-generation': {'impl': 'other/code--p.P'}}
    hugging_face['tokenizer']['tokenizer_config.json']['content']['auto_map'] = {'AutoTokenizer': 'other/code--t.T'}
    torch.save(content, tmp_path / 'own.pt')
    export(tmp_path / 'own.pt', tmp_path / 'out')
    assert not [file for file in (tmp_path / 'out').iterdir() if b'other/code' in file.read_bytes()]
    hugging_face['tokenizer']['config.json'] = {'content': {}}
    torch.save(content, tmp_path / 'own.pt')
    with pytest.raises(ValueError, match=r'its file config.json would replace the file of the model'):
        export(tmp_path / 'own.pt', tmp_path / 'again')
