"""What several test files start from."""

import pytest
import torch
from data import load_data
from training import pretrain

# The files that take longest, to begin with them: at the end no core waits for another's long one.
LONG = ("test_notebooks", "test_package", "test_kernels_cpu", "test_int8", "test_kernels_cuda", "test_experiment",
        "test_codes", "test_quantizer", "test_zoo", "test_readme", "test_export", "test_compare")  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def threads():
    """torch computes on as many threads afterwards, whatever the test sets."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    torch.set_num_threads(1)  # sums in one order, whatever else the machine does


@pytest.fixture(scope="session")
def digits():
    return load_data("digits")


@pytest.fixture(scope="session")
def few_digits():
    return load_data("digits", limit=400)


@pytest.fixture(scope="session")
def nine_layer(digits):
    """The nine-layer network, trained on the digits for a moment."""
    return pretrain(digits, epochs=2, lr=0.05)[0].to(memory_format=torch.contiguous_format)


@pytest.fixture
def refused(capsys):
    """refused(main, *arguments): what a command line says that can't do it, one sentence on stderr; exit code 2."""

    def refused(main, *arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        sentence = capsys.readouterr().err
        assert left.value.code == 2 and len(sentence.splitlines()) == 1 and len(sentence) > 30, sentence
        return sentence

    return refused
