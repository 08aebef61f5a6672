"""What admission asks of every learner: today's, one that knows the limit, and a plain AIMD."""

import ast
import inspect
from math import inf
from pathlib import Path

import pytest
from gate_contract import STEPS, play
from hypothesis import given, settings
from learners import LEARNERS
from worlds import World

from sidecar.admission.gates.rate import RateGate
from sidecar.admission.learning.learner import Effect, Learner, Recovery, Remembered

ROOT = Path(__file__).parents[3]
SURFACE = {name for name in {*vars(Learner), *Learner.__annotations__} if not name.startswith("_")}
BUCKETS = ((10.0, 10.0), (2.0, 1.0), (50.0, 20.0))

every_learner = pytest.mark.parametrize("kind", LEARNERS, ids=str)


class Watched(World):
    """A saturated queue that checks the learner at each attempt."""

    def __init__(self, kind, rate, burst, ceiling=inf):
        self.ceiling = ceiling
        gate = RateGate(0.0, "request_rate", kind.make(rate, burst, ceiling=ceiling))
        super().__init__(rate, burst, gate=gate)

    def at_call(self, sent):
        learner, now = self.gate.learner, self.now
        assert 0.0 < learner.pace(now) <= self.ceiling
        assert learner.capacity >= 1.0
        assert (sent.at, sent.amount) == (now, 1.0)
        known = learner.snapshot()
        assert known.limit == learner.limit > 0.0
        assert known.since <= now
        assert known.error >= 0.0
        assert known.burst >= 0.0
        assert known == learner.snapshot()
        assert learner.rate(now) >= 0.0
        assert learner.use(now) == (0.0 if learner.limit == inf else learner.rate(now) / learner.limit)
        assert learner.window_ends(now) >= now

    def accepted_in(self, seconds):
        """Run for so many seconds; return the accepted attempts per second, and the share that was refused."""
        calls, refused = self.calls, self.refused
        self.run(seconds)
        calls, refused = self.calls - calls, self.refused - refused
        return (calls - refused) / seconds, refused / max(calls, 1)


@every_learner
def test_a_learner_has_the_whole_surface_with_the_declared_parameters(kind):
    learner = kind.make(10.0, 10.0)
    for name in SURFACE:
        assert hasattr(learner, name), name
        declared = vars(Learner).get(name)
        if inspect.isfunction(declared):
            names = [*inspect.signature(declared).parameters][1:]
            assert [*inspect.signature(getattr(learner, name)).parameters] == names, name


def test_everything_outside_uses_no_more_of_a_learner_than_its_surface():
    outside = {}
    for path in (ROOT / "sidecar").rglob("*.py"):
        if "learning" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                called = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if called == "learner" and node.attr not in SURFACE:
                    outside.setdefault(str(path.relative_to(ROOT)), set()).add(node.attr)
    assert not outside


@every_learner
@pytest.mark.parametrize(("rate", "burst"), BUCKETS)
def test_a_bucket_is_used_without_refusals_out_of_bounds(kind, rate, burst):
    world = Watched(kind, rate, burst)
    world.run(60.0)
    used, refused = world.accepted_in(240.0)
    assert used >= kind.used * rate
    assert refused <= kind.refused


@every_learner
@pytest.mark.parametrize("ceiling", [0.5, 6.0])
def test_the_pace_is_positive_and_never_above_the_ceiling(kind, ceiling):
    world = Watched(kind, 10.0, 10.0, ceiling)
    world.run(20.0)
    used, refused = world.accepted_in(60.0)
    assert 0.9 * ceiling <= used <= ceiling + 1 / 60.0
    assert refused == 0.0


@every_learner
def test_the_pace_stays_positive_while_everything_is_refused(kind):
    world = Watched(kind, 10.0, 10.0)
    world.run(20.0)
    world.bucket.rate, world.bucket.level, world.bucket.burst = 0.0, 0.0, 0.0
    world.run(20.0)
    assert world.gate.learner.pace(world.now) > 0.0
    assert world.gate.learner.limit > 0.0


@every_learner
@pytest.mark.parametrize(
    "after",
    [
        Recovery(closed_at=30.0, probed_at=35.0, step=2.0),
        Remembered(limit=10.0, burst=10.0, error=0.1),
        Remembered(limit=5.0, burst=1.0, error=0.3),
        0.4,
        1.0,
    ],
    ids=str,
)
def test_after_a_pause_sending_goes_on_and_half_of_the_rate_is_reached_within_30_s(kind, after):
    world = Watched(kind, 10.0, 10.0)
    world.run(30.0)
    world.now += 5.0
    world.gate.resume(world.now, after)
    calls = world.calls
    world.run(5.0)
    assert world.calls > calls
    world.run(25.0)
    used, refused = world.accepted_in(60.0)
    assert used >= 5.0
    assert refused <= 2 * kind.refused


@every_learner
def test_a_learner_that_knows_nothing_can_resume(kind):
    for after in (Recovery(0.0, 5.0, 2.0), Remembered(3.0, 2.0, 0.2), 0.4):
        learner = kind.make(10.0, 10.0)
        assert isinstance(learner.resumed(5.0, after), Effect)
        assert learner.pace(5.0) > 0.0


@every_learner
def test_what_is_refused_or_void_is_not_part_of_the_accepted_rate(kind):
    learner = kind.make(10.0, 10.0)
    for number in range(30):
        sent = learner.sent(number / 10, 1.0, held=False, pace=10.0)
        if number % 3 == 0:
            learner.accepted(number / 10 + 0.05, sent)
        elif number % 3 == 1:
            learner.void(number / 10 + 0.05, sent)
        else:
            learner.refused_too(number / 10 + 0.05, sent)
    assert learner.rate(3.0) == pytest.approx(10 / 3, rel=0.25)


@every_learner
@pytest.mark.parametrize("dimension", ["request_rate", "token_rate"])
def test_behind_a_rate_gate_every_learner_keeps_the_promises_of_a_gate(kind, dimension):
    @settings(max_examples=60)
    @given(steps=STEPS)
    def check(steps):
        typical = 1.0 if dimension == "request_rate" else 1000.0
        play(RateGate(0.0, dimension, kind.make(10.0 * typical, 10.0 * typical, typical)), steps)

    check()


def test_no_test_of_another_part_names_an_internal_part_of_a_learner():
    allowed = {"learner", "states"}
    named = {}
    for path in (ROOT / "tests").rglob("*.py"):
        if "learning" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                head, _, part = module.partition("sidecar.admission.learning.")
                if not head and part and part.partition(".")[0] not in allowed:
                    named.setdefault(str(path.relative_to(ROOT)), set()).add(part)
            if isinstance(node, ast.Attribute):
                owner = node.value
                called = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if called == "learner" and node.attr not in SURFACE:
                    named.setdefault(str(path.relative_to(ROOT)), set()).add(node.attr)
    assert not named
