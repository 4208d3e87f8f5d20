"""One device, eight, and two processes of four give the same run, however the mesh is cut."""

import functools

import jax
import numpy as np
import pytest
from processes import in_two, result, start

from elastictok.train import data_mesh, data_share, make_mesh, parse_mesh

ALL_AXES = "data=2,sequence=2,fsdp=2"
TOLERANCE = {"GaussianVAE": 1e-5, "FSQ": 1e-3}  # of losses; FSQ rounds, which amplifies


@functools.cache
def runs(*names: str) -> dict:
    return result(start("on_meshes.py", 8, *names))


@functools.cache
def in_two_processes(*names: str) -> dict:
    return in_two("on_meshes.py", *names)


def check(one: dict, other: dict, tolerance: float) -> None:
    assert len(set(one["losses"])) == 10
    assert one["losses"][-1] < 0.8 * one["losses"][0]
    np.testing.assert_allclose(other["losses"][0], one["losses"][0], rtol=1e-5)
    scale = np.abs(one["gradient"]).max()
    np.testing.assert_allclose(other["gradient"], one["gradient"], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=tolerance)
    assert other["compilations"] == 1
    assert other["in place"]


@pytest.mark.parametrize("quantizer", ["GaussianVAE", pytest.param("FSQ", marks=pytest.mark.heavy)])
def test_a_mesh_with_three_axes_gives_the_run_of_one_device(quantizer):
    found = runs(*(f"{quantizer}:{axes}" for axes in ("data=1", ALL_AXES)))
    one, eight = (found[f"{quantizer}:{axes}"] for axes in ("data=1", ALL_AXES))
    check(one, eight, TOLERANCE[quantizer])
    # Not by chance: the parts are parts, gathered for a layer, and keys travel around the ring.
    assert (one["largest part"], eight["largest part"]) == (1.0, 0.5)
    assert one["collectives"] == []
    assert set(eight["collectives"]) == {"all-gather", "all-reduce", "collective-permute"}


@pytest.mark.heavy
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "sequence"])
@pytest.mark.parametrize("quantizer", TOLERANCE)
def test_so_does_every_axis_alone(quantizer, axis):
    names = [f"{quantizer}:data=1"]
    names += [f"{quantizer}:{axis}=8" for axis in ("data", "fsdp", "tensor", "sequence")]
    found = runs(*names)
    check(found[names[0]], found[f"{quantizer}:{axis}=8"], TOLERANCE[quantizer])
    whole = {"data": 1.0, "sequence": 1.0, "fsdp": 0.125, "tensor": 0.125}[axis]
    assert found[f"{quantizer}:{axis}=8"]["largest part"] == whole


@pytest.mark.heavy
def test_two_processes_of_four_devices_give_the_run_of_one_device():
    axes = "data=2,fsdp=2,tensor=2"
    one = runs(*(f"GaussianVAE:{axes}" for axes in ("data=1", ALL_AXES)))["GaussianVAE:data=1"]
    two = in_two_processes(f"GaussianVAE:{axes}")[f"GaussianVAE:{axes}"]
    check(one, two, TOLERANCE["GaussianVAE"])


OVER_TWO = ["GaussianVAE:data=8", "GaussianVAE:sequence=8", f"FSQ:{ALL_AXES}"]


@pytest.mark.heavy
@pytest.mark.parametrize("name", OVER_TWO)
def test_so_do_other_meshes_over_two_processes(name):
    """With sequence=8 both processes bring the whole batch; with data=8 each brings a half."""
    quantizer = name.split(":")[0]
    one = runs(*(f"{quantizer}:{axes}" for axes in ("data=1", ALL_AXES)))[f"{quantizer}:data=1"]
    check(one, in_two_processes(*OVER_TWO)[name], TOLERANCE[quantizer])


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["registers", "coordinates"])
def test_so_does_a_mesh_for_other_encoders_and_decoders(name):
    one, eight = (f"{name}:{axes}" for axes in ("data=1", ALL_AXES))
    found = runs(one, eight)
    check(found[one], found[eight], 1e-5)


@pytest.mark.heavy
def test_a_batch_in_parts_gives_the_run_of_the_whole_batch():
    names = ["GaussianVAE:data=1", "GaussianVAE:data=1:4", "GaussianVAE:data=2,fsdp=2:2"]
    found = runs(*names)
    for name in names[1:]:
        check(found[names[0]], found[name], 1e-5)


def test_axes_are_written_as_in_the_help():
    assert parse_mesh("data=2, fsdp=4") == {"data": 2, "fsdp": 4}
    for text in ("", "data", "data=0", "data=2,data=2", "model=2", "data=2;fsdp=2", "data=-1"):
        with pytest.raises(ValueError, match="no mesh axis; write AXIS=DEVICES"):
            parse_mesh(text)


def test_a_mesh_takes_all_devices():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"takes {2 * count} devices and there are {count}"):
        make_mesh(data=2 * count)
    with pytest.raises(ValueError, match="mesh axis tensor is 0"):
        make_mesh(tensor=0)
    assert data_mesh().shape["data"] == count
    assert data_share(data_mesh()) == (0, 1)
