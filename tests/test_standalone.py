"""The model's code as one file: what one file cannot hold is refused."""

import sys

import pytest

from itt_composer.model import standalone


@pytest.mark.parametrize(
    ('second', 'message'),
    [
        ('def f(): pass', 'f is defined in other.a and in other.b'),
        ('from other import a\ndef g(f): return a.f(f)', r'line 2: f is also a name in this function'),
        ('from other import a\ndef g(): return a.missing()', 'missing is defined in no module'),
        ('import other.a', 'write "from other import'),
        (
            'from other import a\nfrom os.path import join as f\ndef g(): return a.f(1)',
            'f is defined in other.a and imported in other.b',
        ),
        ('from other.a import f as h', 'f is imported under another name'),
    ],
)
def test_what_one_file_cannot_hold_is_refused(second, message, tmp_path, monkeypatch):
    package = tmp_path / 'other'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / 'a.py').write_text('def f(x):\n    return x\n')
    (package / 'b.py').write_text(f'from other.a import f\n{second}' if second == 'def f(): pass' else second)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(standalone, 'PACKAGE', 'other')
    for name in [name for name in sys.modules if name.split('.')[0] == 'other']:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=message):
        standalone.modeling_source('other.b')
