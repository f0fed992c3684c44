"""A few of the faults of harness.py, by chance, at each run of the tests; the seed is in the test's name."""

import os
import time

import harness
import pytest

SEED = int(os.environ.get("DIFFCLIP_FAULTS_SEED", time.time() // 3600))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return harness.World(tmp_path_factory.mktemp("world"), only="pretrain,llava")


@pytest.mark.slow
@pytest.mark.parametrize("stage", harness.TRAININGS)
def test_a_disturbed_stage_comes_to_the_undisturbed_result(world, stage):
    kinds = harness.faults_of(stage)
    done = harness.trial(
        world, stage, 2 * (SEED % 2), kinds[(SEED + harness.TRAININGS.index(stage)) % len(kinds)], SEED
    )
    assert not done.wrong, (SEED, done)
