import pytest

from benchmark.errors import UsageError
from benchmark.machine import describe


def test_the_cpu_is_described():
    told = describe("cpu")
    assert (told["device"], told["capability"]) == ("cpu", None)
    assert 0 < told["free_bytes"] <= told["memory_bytes"]


@pytest.mark.parametrize("name", ["foo", "", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "auto:1"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(UsageError, match=f"--device got {name}, expected auto, cpu, cuda or cuda:N"):
        describe(name)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="--device cuda:99999: this machine has"):
        describe("cuda:99999")
