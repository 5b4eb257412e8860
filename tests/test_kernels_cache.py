"""What the engines keep beside tensors: as long as it is right, no longer than they live, and never too much."""

import gc
import threading
import weakref

import pytest
import torch

from kernels.cache import Beside, Recent


class Made:
    """A value with the numbers that its tensors held when it was made."""

    def __init__(self, tensors, *key):
        self.sum, self.key = sum(t.sum().item() for t in tensors if t is not None), key


@pytest.fixture(autouse=True)
def without_the_cyclic_collector():
    gc.disable()
    yield
    gc.enable()


def test_made_once_for_the_same_tensors_and_key():
    beside, tensors = Beside(Made, 4), (torch.ones(3), None, torch.ones(2))
    first = beside.get(tensors, 16, (1, 1))
    assert first.sum == 5 and first.key == (16, (1, 1))
    assert beside.get(tensors, 16, (1, 1)) is first
    assert beside.get(tensors, 17, (1, 1)) is not first
    assert beside.get((tensors[0], None, torch.ones(2)), 16, (1, 1)) is not first
    assert beside.get((*tensors[:1], tensors[2], None), 16, (1, 1)) is not first


@pytest.mark.parametrize("position", [0, 1])
def test_a_change_in_place_is_noticed(position):
    beside, tensors = Beside(Made, 4), (torch.zeros(3), torch.zeros(3))
    before = beside.get(tensors)
    tensors[position][1] = 7
    assert beside.get(tensors) is not before and beside.get(tensors).sum == 7
    assert len(beside) == 1  # in place of the other


def test_a_change_while_it_is_made_is_noticed():
    def make(tensors):
        made = Made(tensors)
        if made.sum == 0:
            tensors[0].add_(1)
        return made

    beside, tensors = Beside(make, 4), (torch.zeros(3),)
    assert beside.get(tensors).sum == 0 and beside.get(tensors).sum == 3


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        tensors = torch.ones(3), None
    beside = Beside(Made, 4)
    assert beside.get(tensors) is beside.get(tensors)


@pytest.mark.parametrize("position", [0, 1])
def test_it_dies_with_any_of_its_tensors(position):
    beside, tensors = Beside(Made, 4), [torch.ones(3), torch.ones(3), None]
    other = (torch.ones(3),)
    beside.get(other)
    made = weakref.ref(beside.get(tensors))
    assert len(beside) == 2 and made() is not None
    tensors[position] = None
    assert len(beside) == 1 and made() is None
    del other
    assert len(beside) == 0


def test_it_dies_with_tensors_in_a_cycle():
    beside, cycle = Beside(Made, 4), [torch.ones(3)]
    made = weakref.ref(beside.get(cycle))
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert len(beside) == 0 and made() is None


def test_the_least_recently_used_beside_a_tensor_goes():
    beside, tensors, others = Beside(Made, 3), (torch.ones(3),), (torch.ones(3),)
    other = beside.get(others)
    made = [beside.get(tensors, key) for key in range(3)]
    assert beside.get(tensors, 0) is made[0]  # used again, so the second is the oldest now
    beside.get(tensors, 3)
    assert len(beside) == 4 and beside.get(others) is other
    assert beside.get(tensors, 0) is made[0] and beside.get(tensors, 2) is made[2]
    assert beside.get(tensors, 1) is not made[1]


def test_recent_is_bounded_too():
    recent = Recent(3)
    made = [recent.get(key, Made, (), key) for key in range(3)]
    assert recent.get(0, Made, ()) is made[0]
    second = weakref.ref(made.pop(1))
    assert recent.get(3, Made, (), 3).key == (3,)
    assert len(recent) == 3 and second() is None and recent.get(0, Made, ()) is made[0]


def test_threads():
    """Many threads on few tensors, which others change, replace and drop: nobody gets what is not theirs."""
    beside, recent, wrong = Beside(Made, 2), Recent(2), []
    shared = [(torch.zeros(1), torch.full((1,), float(i))) for i in range(3)]

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for step, draw in enumerate(torch.randint(0, 60, (2000,), generator=generator).tolist()):
                i, key = draw % 3, draw % 5
                made = beside.get(shared[i], key)
                if (made.sum, made.key) != (i, (key,)):
                    wrong.append((made.sum, i))
                mine = (torch.full((1,), float(step)), shared[i][1])
                if beside.get(mine, key).sum != step + i:
                    wrong.append(step)
                if draw == 0:
                    shared[i][0].zero_()  # another version, the same sum
                if recent.get(key, Made, mine[1:], key).key != (key,):
                    wrong.append(key)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    gc.enable()
    for worker in workers:
        worker.join()
    assert not wrong
    assert len(beside) <= 6 and len(recent) <= 2
    shared.clear()
    assert len(beside) == 0
