"""Where a worker finds the run."""

import pytest

from orchestrator.cluster.layout import Layout
from orchestrator.errors import UserError
from orchestrator.objects.address import parse
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import places
from orchestrator.workers.ray_train import one_here


@pytest.mark.parametrize(
    ("mirror", "says"),
    [
        (None, "storage: .* has no run in .*/run; mount the same folder on all nodes"),
        ("s3://bucket/m", "storage: s3://bucket/m on several nodes needs a worker on the machine"),
    ],
)
def test_rank_0_without_the_folder_of_the_run_is_refused(tmp_path, monkeypatch, mirror, says):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = RunFolder(tmp_path / "run")
    address = None if mirror is None else parse("mirror", mirror)
    config = places.of_driver(folder, tmp_path / "data", address) | {"key": "that of the driver"}
    with pytest.raises(UserError, match=says) as refused:
        places.find(config, 0)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "cache").exists()


def test_one_worker_is_on_the_machine_of_the_command_if_it_can(ray_cluster):
    import ray
    from ray.util.placement_group import placement_group, placement_group_table
    from ray.util.placement_group import remove_placement_group as remove

    own = ray.get_runtime_context().get_node_id()
    assert one_here(Layout(1, 10_000, False)) is None
    assert one_here(Layout(1, 1, True)) is None
    selectors = one_here(Layout(2, 1, False))
    group = placement_group([{"CPU": 1}, {"CPU": 1}], bundle_label_selector=selectors)
    assert group.wait(60)
    assert placement_group_table(group)["bundles_to_node_id"][0] == own
    remove(group)
    other = [{"ray.io/node-id": "0" * len(own)}]  # the label is that of Ray
    group = placement_group([{"CPU": 1}], bundle_label_selector=other)
    assert not group.wait(1)
    remove(group)
