"""Answering gates: by whom in place of a person, and whether an answer fits.

Strategy: a gate that has opened is put once to those who may answer it unasked, in this order: mode ``unattended``, the
tape, the policy ``on_gate``. Their answer is a proposal like a person's, which a faster person beats. When nobody
answers and nobody is there, a failed step ends the run; any other gate is kept as unheard, and lets it rest. Of a gate
that a person has to answer, here or elsewhere, ``on_waiting`` tells somebody.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from . import allowed, waiting
from . import state as meaning
from .driving import Driver
from .errors import AlreadyDecided, CodeMachineError, TransitionError, brief, did_you_mean
from .events import AnyEvent, Decision, Gate, GateDecided, RunFinished, StepFailed, TellingFailed
from .runstate import RunState
from .starting import GatePolicy
from .tools import read_arguments
from .work import Work
from .workflow import fitted

POLICY_FEEDBACK = "Rejected by the policy on_gate='reject'."


class Answers:
    """Who answers the gates of one run in place of a person, and whether a person is there.

    Attributes
    ----------
    on_gate, tape
        The policy and the recorded run, where they are given.
    on_waiting
        Who is told that a person is needed; see ``waiting.py``.
    somebody
        Whether a person can answer here.
    asked
        Ids of the gates that were put to those who may answer.
    """

    def __init__(self, driver: Driver, work: Work) -> None:
        self.on_gate: GatePolicy | None = None
        self.on_waiting: waiting.Told | None = None
        self.tape: Any = None
        self.somebody = True
        self.asked: set[str] = set()
        self._driver = driver
        self._work = work
        self._rejected: set[str] = set()
        self._told: set[str] = set()

    # -- in place of a person -----------------------------------------------------------------------------------------

    def put_open(self) -> None:
        """Put the gates that have opened to those who may answer them."""
        state = self._driver.state
        if self.asked or state.gates:
            self.asked.intersection_update(state.gates)
            for gate in list(state.gates.values()):
                if gate.id not in self.asked:
                    self.asked.add(gate.id)
                    self._put_to(gate)

    def ask_anew(self, on_gate: GatePolicy) -> None:
        """Another policy answers from now on, the gates that are open included."""
        self.on_gate = on_gate
        self.asked.clear()
        self._driver.unheard.clear()
        self._driver.wait_anew()

    def _put_to(self, gate: Gate) -> None:
        """Ask those who may answer in place of a person: the mode, the tape, the policy; else it waits."""
        # A budget is what holds a run that nobody watches: being unattended must not lift it.
        if self._driver.state.mode == "unattended" and "approve" in gate.actions and gate.kind != "budget":
            self._decide_soon(gate, Decision(action="approve", by="unattended mode"))
            return
        taped = self.tape.decision(gate) if self.tape is not None and not self.somebody else None
        if taped is not None:
            self._decide_soon(gate, taped)
        elif callable(self.on_gate):
            threading.Thread(target=self._ask_policy, args=(gate, self.on_gate), daemon=True, name="cm-on-gate").start()
        elif self.on_gate is not None and self.on_gate in gate.actions and gate.path not in self._rejected:
            feedback = None
            if self.on_gate == "reject":
                feedback = POLICY_FEEDBACK
                if gate.kind != "permission":  # of those, every one
                    self._rejected.add(gate.path)
            self._decide_soon(gate, Decision(action=self.on_gate, feedback=feedback, by="on_gate"))
        else:
            self._unanswered(gate)

    def _ask_policy(self, gate: Gate, policy: Callable[[Gate], Any]) -> None:
        decision: Decision | None = None
        try:
            said = waiting.called(policy, gate)
            if isinstance(said, str):
                if said not in gate.actions:
                    can = did_you_mean(said, gate.actions, "Possible")
                    raise TransitionError(f"on_gate returned {said!r} for the {gate.kind} gate of {gate.step!r}. {can}")
                decision = Decision(action=said, feedback=POLICY_FEEDBACK if said == "reject" else None, by="on_gate")
            elif isinstance(said, Decision):
                decision = said.model_copy(update={"by": "on_gate"})
            elif said is not None:
                raise TransitionError(
                    f"on_gate returned {brief(said)}; it returns a Decision, an action's name or None."
                )
            if decision is not None:
                decision = self.checked(gate, decision)
        except Exception as error:
            self._driver.error = error
            reason = f"on_gate at {gate.step}: {error}"

            def give_up() -> list[AnyEvent]:
                cut = meaning.cut_all(self._driver.state, "the run failed")
                return [*cut, RunFinished(status="failed", reason=reason)]

            self._driver.propose(give_up, wait=False)
            return
        if decision is not None:
            self._decide_soon(gate, decision)
        elif self._driver.loop is not None:
            self._driver.loop.call_soon_threadsafe(self._nobody_answered, gate)

    def _decide_soon(self, gate: Gate, decision: Decision) -> None:
        if decision.scope == "always":  # the person's own list is for persons to write
            decision = decision.model_copy(update={"scope": "run"})

        def propose() -> list[AnyEvent]:
            if gate.id not in self._driver.state.gates:
                return []  # a person was faster
            return [GateDecided(gate_id=gate.id, decision=decision)]

        self._driver.propose(propose, wait=False)

    def _nobody_answered(self, gate: Gate) -> None:
        self._unanswered(gate)
        self._driver.come_to_rest()

    def _unanswered(self, gate: Gate) -> None:
        if self.somebody or gate.default is not None or gate.kind != "failed":  # of those without, the run ends
            self._tell(gate)
        if self.somebody or gate.default is not None:  # without one it could only stop, and later
            return
        if gate.kind == "failed" and gate.path in self._driver.state.members:
            why = str(gate.payload.get("error", "failed"))

            def give_it_up() -> list[AnyEvent]:
                if gate.id not in self._driver.state.gates:
                    return []  # its caller has ended
                return [StepFailed(step=gate.step, path=gate.path, reason=why)]

            self._driver.propose(give_it_up, wait=False)
        elif gate.kind == "failed":
            reason = f"{gate.step}: {gate.payload.get('error', 'failed')}"
            self._driver.propose(lambda: [RunFinished(status="failed", reason=reason)], wait=False)
        else:
            self._driver.unheard[gate.id] = gate

    def tell_anew(self, on_waiting: waiting.Told | None) -> None:
        """Who is told of gates from now on, those included that are open where the run is taken up."""
        self.on_waiting, self._told = on_waiting, set()

    def _tell(self, gate: Gate) -> None:
        """Tell somebody that a person is needed, once."""
        driver = self._driver
        if self.on_waiting is None or gate.id in self._told:
            return
        from .render import shell  # not needed to import the package

        self._told.add(gate.id)
        with driver.reading() as state:
            if gate.id not in state.gates:
                return
            facts = shell.facts(state, gate, shell.Shell(driver.id, driver.journal.path))

        def failed(why: str) -> None:
            def propose() -> list[AnyEvent]:
                return [TellingFailed(gate_id=gate.id, reason=why)] if gate.id in driver.state.gates else []

            with contextlib.suppress(CodeMachineError):  # the run was given up meanwhile
                driver.propose(propose)

        waiting.tell(self.on_waiting, gate, facts, failed)

    def allow_alike(self) -> None:
        """A tool was allowed for longer: others who wait for the same need not be asked."""
        for gate in self._driver.state.gates.values():
            given = self._driver.state.allowed.get(meaning.tool_of(gate)) if gate.kind == "permission" else None
            if given is not None:
                self._decide_soon(gate, Decision(action="approve", by=given.by))

    # -- what is answered ---------------------------------------------------------------------------------------------

    def checked(self, gate: Gate, decision: Decision) -> Decision:
        """The decision as it is to be kept: an edited value is whole, with what its class adds to it.

        One that does not fit is refused, also by what its agent and the tool take, where they are known here.
        """
        meaning.check_decision(gate, decision)
        agent = self._work.agents.get(self._driver.state.find(gate.path).step.agent)
        prompt = decision.output if gate.kind == "start" else decision.prompt
        if prompt is not None and not prompt.strip() and agent is not None and agent.implementation is None:
            raise TransitionError(f"the prompt for {gate.path!r} is empty. Write what the agent should do.")
        model = self._work.model(gate.path) if gate.kind in ("review", "exhausted") else None
        if model is not None and decision.output is not None:
            value, wrong = fitted(model, decision.output)
            if wrong is not None:
                raise TransitionError(f"the edited text does not fit {model.__name__}: {wrong}")
            if value != json.loads(decision.output):
                whole = json.dumps(value, indent=2, ensure_ascii=False)
                decision = decision.model_copy(update={"output": whole})
        tool = self._work.tool(gate.path, meaning.tool_of(gate)[0]) if gate.kind == "permission" else None
        if tool is not None and decision.output is not None and tool.checker is not None:
            try:
                tool.check(read_arguments(decision.output))
            except ValueError as error:
                raise TransitionError(f"{tool.name} does not take these arguments: {error}.") from None
        return decision

    def allow_always(self, gate: Gate) -> None:
        """Put the tool that the gate asks for on the person's own list.

        Raises
        ------
        CodeMachineError    It cannot be kept there.
        """
        tool, implementation = meaning.tool_of(gate)
        rule = allowed.Rule(
            tool=tool, implementation=implementation, run=self._driver.id, step=gate.step, at=time.time()
        )
        try:
            allowed.keep(self._driver.journal, rule)
        except CodeMachineError as error:
            raise CodeMachineError(
                f"that {tool} may always be called cannot be kept, so nothing is decided: {error}"
            ) from None

    def gate(self, step: Any = None) -> Gate:
        """The open gate that is meant; see :meth:`Run.gate`."""
        with self._driver.reading() as state:
            opened = list(state.gates.values())
            if step is None:
                if len(opened) == 1:
                    return opened[0]
                if not opened:
                    if self._driver.lost is not None:
                        raise TransitionError(
                            f"run {self._driver.id!r} was given up here, so no gate is open: {self._driver.lost}"
                        )
                    if state.last_gate is not None:
                        self._check_answered(state, state.last_gate)
                    raise TransitionError(f"no gate is open: run {self._driver.id!r} is {state.status}.")
                raise TransitionError(
                    f"several gates are open; name the step: {', '.join(gate.path for gate in opened)}."
                )
            if isinstance(step, str) and step not in state.members and state.named(step) is None:
                meant = [gate for gate in opened if gate.step == step]
                if len(meant) == 1:
                    return meant[0]
                if meant:
                    paths = ", ".join(gate.path for gate in meant)
                    raise TransitionError(f"several gates of {step!r} are open; name the one: {paths}.")
                called = [member.path for member in state.members.values() if member.id == step]
                if state.last_gate is not None and state.last_gate.path in called:
                    step = state.last_gate.path  # whose gate was open last
                elif len(called) == 1:
                    step = called[0]
                elif called:
                    raise TransitionError(f"no gate of {step!r} is open.")
            found = state.find(step)
            if found.gate is not None:
                return found.gate
            last = found.last
            if last is not None and last.decision is not None:
                raise AlreadyDecided(f"{found.path!r} was {meaning.already(last.decision)}")
            if state.last_gate is not None and state.last_gate.path == found.path:
                self._check_answered(state, state.last_gate)
            raise TransitionError(f"{found.path!r} has no open gate: it {meaning.standing(state, found)}.")

    def _check_answered(self, state: RunState, gate: Gate) -> None:
        """Say what became of a gate that is open no more."""
        answer = state.decisions.get(gate.id)
        step = state.steps.get(gate.path) or state.members.get(gate.path)
        if answer is not None:
            raise AlreadyDecided(f"{gate.path!r} was {meaning.already(answer)}")
        if state.ended in ("stopped", "failed") and step is not None:
            raise AlreadyDecided(meaning.closed(state, step, self._driver.resuming))
