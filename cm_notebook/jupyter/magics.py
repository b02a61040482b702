"""``%cm`` and ``%%cm``: a line is read, one method is called, and what came of it is shown.

Strategy: a subcommand is a method of its name that turns words into the call of its Python twin (``options.py`` has the
table) and shows the result under the cell. Whether that is a new run, an old one or a new attempt is not known here:
``notebook.py`` and the run know. Nobody's variables are written, except ``-o NAME``. What a magic has shown is returned
too, and not shown a second time (``Shown``). Whatever is wrong is one line, without a traceback. What only some of them
draw with is imported by those, at their first use: ``%load_ext`` need not wait for it.
"""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from .. import config, keys, options
from .. import workflow as define
from ..allowed import Permissions, permissions
from ..errors import CodeMachineError, GatePending, TransitionError, WorkflowError
from ..events import EDITABLE, Decision
from ..render import text
from ..run import Run, both
from ..run import runs as all_runs
from ..runstate import Attempt, RunState
from ..starting import check_options
from ..steps import StepView
from ..workflow import Agent, Step, Workflow, parse_steps
from . import bridge
from .notebook import Notebook, Plan

Values = dict[str, Any]


class Text(str):
    """A text that was shown as something better: a picture, a coloured difference, a sentence."""

    __slots__ = ()


class Runs(list[Run]):
    """Runs that were shown as a table."""


class Shown:
    """What the present cell has shown, so that IPython does not show the same object as its result again."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._thing: object = None
        self._cell = -1

    def note(self, thing: object) -> None:
        """`thing` stands under the present cell."""
        self._thing, self._cell = thing, self._shell.execution_count

    def __call__(self, thing: Any) -> None:
        """IPython's hook; a run that the cell has not shown is shown live.

        Raises
        ------
        NotImplementedError    IPython displays `thing` as it does everything.
        """
        if thing is self._thing and self._cell == self._shell.execution_count:
            return
        if not isinstance(thing, (Run, StepView)) or bridge.kernel() is None or not bridge.somebody():
            raise NotImplementedError
        from . import view

        if isinstance(thing, Run):
            thing.show_here()
        else:
            view.show(thing.run, [thing.id])

    TYPES = (Run, StepView, Attempt, Workflow, Agent, Text, Runs, Permissions, "cm_notebook.checkup.Report")


@magics_class
class CMMagics(Magics):
    """The magic, for one shell."""

    def __init__(self, shell: Any, notebook: Notebook, shown: Shown) -> None:
        super().__init__(shell)
        self._shell, self._notebook, self._shown = shell, notebook, shown

    @no_var_expand
    @line_cell_magic
    def cm(self, line: str = "", cell: str | None = None) -> Any:
        """Workflows of AI agents, step by step, with you deciding at the right moments.

        A workflow, cell by cell; each step runs under its own cell:
            %cm workflow careful-builder --autonomous never
            %%cm step planner
            Plan {{ goal }} in at most five steps.
        At a gate, press a button or run one of:
            %cm approve     %cm reject name the tests     %cm edit     %cm skip     %cm retry     %cm answer YES
        A workflow in one go (? pauses, (…) may loop back):
            %%cm agent planner
            Plan {{ goal }}.
            %%cm workflow smart-builder --autonomous always
            researcher -> planner -> quality-gate(loop 1, max 5) -> reviewer? -> deployer
            run = %cm run
        Building:  workflow  agent  step  module  remove
        Running:   run  next  pause  stop  resume  rewind  fork  mode
        Deciding:  approve  reject  edit  skip  retry  answer
        Looking:   show  diff  graph  status  runs  permissions  config  keys  doctor
        Sharing:   export

        {{ name }} in a prompt is a step's output, an input (--input name=…), or a variable of the notebook.
        `%cm` alone says where things stand; `%cm step --help` says more about one subcommand.
        """
        try:
            request = options.read(line, cell=cell is not None, variables=self._shell.user_ns)
            if request.help is not None:
                print(request.help)
                return None
            if request.command is None:
                print(self._overview())
                return None
            values = dict(request.values)
            out = values.pop("out", None)
            if out is not None and not str(out).isidentifier():
                raise WorkflowError(f"-o {out!r} is not a name that a variable can have. For instance: -o run")
            method: Callable[[Values, str | None], Any] = getattr(self, f"_{request.command.name}")
            body = cell.strip() if cell is not None else None
            if body == "" and request.command.name != "workflow":
                raise WorkflowError(
                    f"The body of `%%cm {request.command.name}` is empty. Write it below the first line."
                )
            result = method(values, body or None)
        except GatePending:
            raise  # it shows itself: one sentence, and the gate again
        except CodeMachineError as error:
            self._keep(error)
            line_only = [self._sentence(str(error))]
            error.__dict__["_render_traceback_"] = lambda: line_only  # IPython's hook: no traceback, also when saved
            raise
        if out is not None:
            self._shell.user_ns[out] = result
        self._shown.note(result)
        return result

    def _sentence(self, said: str) -> str:
        """With a capital letter, unless it begins with a name of the person's."""
        first = said.partition(" ")[0].rstrip(":,")
        book = self._notebook
        names = {*book.agents, *(book.plan.placed if book.plan is not None else ())}
        names |= {book.plan.name} if book.plan is not None else set()
        with contextlib.suppress(CodeMachineError):
            state = book.current().state
            names |= {state.name, *state.steps}
        return said[:1].upper() + said[1:] if first.isalpha() and first not in names else said

    def _keep(self, error: CodeMachineError) -> None:
        """The line is all that is shown; the traceback stays on ``run.error``, unless the run has one of its own."""
        with contextlib.suppress(CodeMachineError):
            run = self._notebook.current()
            run.error = run.error or error

    # -- building ------------------------------------------------------------------------------------------------------

    def _workflow(self, values: Values, body: str | None) -> Workflow | None:
        from ..render import svg

        new, unsaid = values.pop("new", False), "autonomous_mode" not in values
        plan = Plan(**values, body=parse_steps(body) if body is not None else None)
        kept = self._notebook.define(plan, new=new)
        state = self._notebook.sketch()
        with self._notebook.current().reading() if kept else contextlib.nullcontext(state) as now:
            written, known = ([one.step for one in (drawn.order if drawn else ())] for drawn in (state, now))
            # where a cell for each step builds it, the run keeps those whose cells this kernel has not run yet
            kept_all = written == known or (plan.body is None and all(step in known for step in written))
            shown = now if kept_all else state
            if shown is not None and shown.order:
                self._display(svg.graph(shown, "text"), svg.graph_img(shown))
        if kept:
            print(" ".join(kept))
        else:
            asks = [step.id for step in state.order if step.step.interactive] if state is not None else []
            first = f"It asks you at {', '.join(asks)};" if asks else "It runs by itself;"
            drives = f" {first} with `--autonomous never` it asks you after each step." if unsaid else ""
            if state is None:
                print(f"{plan.name} has no steps yet.{drives} Next: %%cm step NAME, and its prompt in the lines below.")
            else:
                print(f"{plan.name}: {text.steps(len(state.order))}.{drives} Next: %cm run")
        if left := self._notebook.left_words():
            print(left)
        return self._notebook.draft()

    def _agent(self, values: Values, body: str | None) -> Agent:
        engine, colon, model = str(values.get("engine") or "").partition(":")
        if colon:
            values["engine"] = engine
            values.setdefault("model", model)
        check_options(engine=values.get("engine"))
        made = Agent(prompt=body or "", **values)
        again = made.id in self._notebook.cell_agents
        self._notebook.cell_agents[made.id] = made
        print(f"Agent {made.id} is defined{' anew; its steps take it when they run next' if again else ''}.")
        return made

    def _step(self, values: Values, body: str | None) -> Any:
        return self._put(values, body, define.step)

    def _module(self, values: Values, body: str | None) -> Any:
        return self._put(values, body, define.module)

    def _put(self, values: Values, body: str | None, make: Callable[..., Step]) -> Any:
        after, only_add = values.pop("after", None), values.pop("no_run", False)
        agent = values.pop("agent", values["id"])
        check_options(engine=values.get("engine"))
        if body is not None and agent != values["id"]:
            self._notebook.check_agent(agent)
        step = make(agent, prompt=body, **values)
        if only_add or body is None:
            print(f"{step.id} {_PLACED[self._notebook.place(step, after)]} Next: %cm run, or %cm next")
            return None
        run = self._notebook.run_step(step, after)
        self._present(run, [step.id])
        return run[step.id]

    def _remove(self, values: Values, body: str | None) -> None:
        self._notebook.remove(values["step"])
        print(f"{values['step']} is removed.")

    # -- running -------------------------------------------------------------------------------------------------------

    def _run(self, values: Values, body: str | None) -> Run:
        view = values.pop("view", None)
        run = self._notebook.go(again=values.pop("from_", None), **values)
        self._present(run, view=view)
        return run

    def _next(self, values: Values, body: str | None) -> Run:
        run, step = self._notebook.next()
        self._present(run, [step])
        return run

    def _resume(self, values: Values, body: str | None) -> Run:
        run = self._notebook.take_up(values["run"], values.get("on_waiting"))
        self._present(run)
        return run

    def _rewind(self, values: Values, body: str | None) -> Run:
        run = self._notebook.rewind(values["step"], values.get("run"))
        self._say_back(run)
        return run

    def _fork(self, values: Values, body: str | None) -> Run:
        run_id = values.pop("run", None)
        run = self._notebook.fork(values.pop("step"), run_id, **values)
        with run.reading() as state:
            print(f"Run {run.id} is a {text.fork_words(state)}.")
        self._say_back(run)
        return run

    def _say_back(self, run: Run) -> None:
        with run.reading() as state:
            print(text.sentence(state))

    def _stop(self, values: Values, body: str | None) -> Run:
        run = self._notebook.current().stop()
        print(f"{run.state.name} is stopped. `%cm run` goes on with it.")
        return run

    def _pause(self, values: Values, body: str | None) -> Run:
        run = self._notebook.current().pause()
        print(f"{run.state.name} is paused: what runs may finish. `%cm run` goes on.")
        return run

    def _mode(self, values: Values, body: str | None) -> Run:
        run = self._notebook.current().set_mode(values["mode"])
        name, gates = run.state.name, " A gate that is open stays open." if run.gates else ""
        if run.status == "paused":
            print(f"{name} stays paused; its mode is {run.mode} from `%cm run` on.{gates}")
        else:
            print(f"{name} goes on in mode {run.mode}.{gates}")
        return run

    # -- deciding ------------------------------------------------------------------------------------------------------

    def _approve(self, values: Values, body: str | None) -> Run:
        return self._decide(action="approve", **{"step": None, **values})

    def _skip(self, values: Values, body: str | None) -> Run:
        return self._decide(values.get("step"), action="skip")

    def _retry(self, values: Values, body: str | None) -> Run:
        return self._decide(values.get("step"), action="retry", count=values.get("count", 1), prompt=body)

    def _reject(self, values: Values, body: str | None) -> Run:
        return self._decide(values.get("step"), action="reject", feedback=_words(values, body))

    def _answer(self, values: Values, body: str | None) -> Run:
        return self._decide(values.get("step"), action="answer", feedback=_words(values, body))

    def _edit(self, values: Values, body: str | None) -> Run:
        from ..render.shell import editable

        if body is not None:
            return self._decide(values.get("step"), action="approve", output=body)
        run = self._notebook.deciding(values.get("step"))
        gate = run.gate(values.get("step"))
        with run.reading() as state:
            written = editable(state, gate)
            if written is None:
                magics = " or ".join(f"`{way.magic}`" for way in text.ways(state, gate))
                raise TransitionError(f"{gate.step} has no text to edit: it asks a question. Use {magics}.")
        head, then = f"%%cm edit {gate.path}", "goes on with it"
        if gate.kind == "permission":
            then = f"calls {gate.payload.get('tool')} with these arguments"
        elif gate.kind not in EDITABLE:
            head, then = f"%%cm retry {gate.path}", "is tried again with this prompt"
        self._shell.set_next_input(f"{head}\n{written}")
        print(f"Edit the text in the cell below and run that cell: {gate.step} {then}.")
        return run

    def _decide(self, step: str | None, **decision: Any) -> Run:
        run = self._notebook.deciding(step)
        if not bridge.somebody() and not run.gates:
            print(f"Nothing is to be decided here: {run.state.name} is {run.status}.")
            return run
        gate = run.gate(step)
        self._notebook.may_decide(gate)
        try:
            run.decide(gate.id, Decision(**decision), digest=gate.digest)
        except ValueError as error:  # pydantic's
            raise WorkflowError(f"this is no decision: {decision}. {error}".splitlines()[0]) from error
        with run.reading() as state:
            print(f"{gate.path}: {text.decided(state, state.decisions[gate.id], live=bridge.somebody())}.")
        self._say_idle(run)
        return run

    def _say_idle(self, run: Run) -> None:
        """Say that nothing comes by itself of a run that nobody drives: the kernel that did was restarted."""
        if run.state.ended is None and not run.driven:
            print("Nobody drives this run now. `%cm run` goes on with it.")

    # -- looking -------------------------------------------------------------------------------------------------------

    def _show(self, values: Values, body: str | None) -> Any:
        from ..render import html

        run, step = self._notebook.current(), values.pop("step", None)
        if step is None:
            self._present(run, wait=False)
            self._say_idle(run)
            return run
        number, full = values.get("number"), values.get("full", False)
        seen = run[step]
        # Static even while it runs: the live card belongs under the cell of its step and would move here.
        with run.reading() as state:
            shown = state.find(step)
            attempt = html.find_attempt(shown, number) if number is not None else None
            self._display(text.show_text(state, shown, attempt, full), html.show_html(state, shown, number, full))
        return seen if number is None else seen.attempt(number)

    def _diff(self, values: Values, body: str | None) -> Text:
        from ..render import compare, diff, html

        run = self._notebook.current()
        numbers = [*values.get("attempts", [])]
        if "against" in values:
            if numbers:
                raise WorkflowError("`%cm diff --against` compares two runs as they are: leave out the attempts.")
            other = self._notebook.named(values["against"])
            with both(other, run) as (theirs, mine):
                said = Text(compare.text(theirs, mine, values.get("step")))
                self._display(said, compare.compare_html(theirs, mine, values.get("step")))
            return said
        if "step" not in values:
            raise WorkflowError("`%cm diff` needs a step, or another run. For instance: %cm diff implementer 1 3")
        if len(numbers) > 2:
            raise WorkflowError("`%cm diff` compares two attempts. For instance: %cm diff implementer 1 3")
        a, b = numbers if len(numbers) == 2 else (*numbers, -1) if numbers else (-2, -1)
        step = run[values["step"]]
        if len(step.attempts) < 2:
            _ = step.text  # raises, with the gate, when it waits for a decision
            made = "one attempt" if step.attempts else "no attempt"
            raise TransitionError(f"{step.id} has {made} so far; there is nothing to compare.")
        old, new = step.attempt(a), step.attempt(b)
        with run.reading() as state:
            made = Text(diff.text(old.text, new.text))
            columns = values.get("side_by_side", False)
            self._display(made, html.diff_html(state, state.find(step.path), a, b, columns=columns))
        return made

    def _graph(self, values: Values, body: str | None) -> Text:
        from ..render import svg, timeline

        kind = values.get("format", "svg")
        if values.get("timeline"):
            run = self._notebook.current()
            drawn = Text(run.graph(kind, timeline=True))
            if kind == "svg":
                now = None if run.state.ended is not None else time.time()
                self._display(run.graph("text", timeline=True), timeline.img(run.events, now))
            else:
                print(drawn)
            return drawn
        state = self._state()
        if state is None:
            raise TransitionError("there is nothing to draw yet. Begin with `%cm workflow NAME`.")
        made = Text(svg.graph(state, kind))
        if kind == "svg":
            self._display(svg.graph(state, "text"), svg.graph_img(state))
        else:
            print(made)
        return made

    def _state(self) -> RunState | None:
        """The run's, or that of a workflow which has none yet."""
        book = self._notebook
        try:
            return book.current().state
        except TransitionError:
            return book.sketch() if book.plan is not None else None

    def _status(self, values: Values, body: str | None) -> Run:
        from ..render import html

        run = self._notebook.current()
        with run.reading() as state:
            self._display(text.status_table(state), html.status_html(state))
        self._say_idle(run)
        return run

    def _export(self, values: Values, body: str | None) -> Text:
        from ..exports import is_program

        file = Path(values["file"])
        workflow = self._notebook.exported() if is_program(file) else None
        source = workflow if workflow is not None else self._notebook.current()
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            made = source.export(file, overwrite=values.get("overwrite", False))
        print("\n".join([f"{made} is written.", *(str(one.message) for one in noted)]))
        return Text(made)

    def _runs(self, values: Values, body: str | None) -> Runs:
        from ..render import html

        found = Runs(all_runs())
        rows = []
        for run in found:
            with run.reading() as state:
                name = ", ".join(filter(None, (state.name, text.fork_words(state))))
                stands = run.status if state.ended is not None or run.driven else text.undriven(run.status)
                rows.append((run.id, name, stands, state.started_at))
        lines = text.table([["Run", "Workflow", "State", "Started"], *text.runs_rows(rows)])
        self._display("\n".join(lines) if rows else "There are no runs yet.", html.runs_html(rows))
        return found

    def _permissions(self, values: Values, body: str | None) -> Permissions:
        found = permissions()
        if values.get("what") == "revoke":
            if "tool" not in values:
                hint = ", ".join(dict.fromkeys(rule.tool for rule in found)) or "none"
                raise WorkflowError(f"`%cm permissions revoke` needs a tool's name. Always allowed: {hint}.")
            found.revoke(values["tool"])
        self._display(repr(found), found._repr_html_())
        return found

    def _config(self, values: Values, body: str | None) -> None:
        rows = []
        for name, setting in config.SETTINGS.items():
            try:
                value, where = config.lookup(name)
                rows.append([f"CM.{name}", repr(config.shown(value)), where, setting.meaning])
            except CodeMachineError as error:
                rows.append([f"CM.{name}", "(wrong)", "", str(error)])
        note = "To change one: `%config CM.engine = 'offline'`"
        self._display_table(["Setting", "Value", "From", "Meaning"], rows, note)

    def _keys(self, values: Values, body: str | None) -> None:
        action, name = values.get("action", ""), values.get("name", "")
        if action not in ("", "set", "forget") or bool(action) is not bool(name):  # it may be a key: not repeated
            raise WorkflowError("`%cm keys` takes set or forget, and an engine. For instance: %cm keys set anthropic")
        if action == "set":
            keys.set(name)
            print(f"{name} has a key until this session ends. `%cm keys forget {name}` forgets it.")
        elif action == "forget":
            keys.forget(name)
            print(f"The key of {name} is forgotten.")
        else:
            rows = [[engine, where or "none"] for engine, where in keys.sources().items()]
            self._display_table(["Engine", "Key"], rows, "To set one: `%cm keys set anthropic`")

    def _doctor(self, values: Values, body: str | None) -> Any:
        from ..checkup import examine

        report = examine()
        bundle = report._repr_mimebundle_()
        self._display(bundle["text/plain"], bundle["text/html"])
        return report

    def _overview(self) -> str:
        """Where things stand, and what to try next: bare ``%cm``."""
        book = self._notebook
        try:
            run = book.current()
        except TransitionError:
            if book.plan is None:
                return "No workflow yet. Try: %cm workflow my-workflow    (or %cm? for examples)"
            sketch = book.sketch()
            count = len(sketch.order) if sketch is not None else 0
            following = "%cm run" if count else "%%cm step NAME"
            said = f"Workflow {book.plan.name}: {text.steps(count)}, no run yet. Try: {following}"
            return "\n".join(filter(None, (said, book.left_words())))
        with run.reading() as state:
            stands = run.status if state.ended is not None or run.driven else text.undriven(run.status)
            lines = [f"Workflow {state.name}, run {run.id}: {stands}, mode {state.mode}."]
            lines += [f"Gate: {text.gate_sentence(state, gate)}" for gate in state.gates.values()]
            first = next(iter(state.gates.values()), None)
            if first is not None:
                lines.append("Try: " + " · ".join(way.magic for way in text.ways(state, first)))
            else:
                lines.append("Try: " + ("%cm status" if stands in ("running", "completed") else "%cm run"))
        lines += filter(None, [book.left_words()])
        return "\n".join(lines)

    # -- showing -------------------------------------------------------------------------------------------------------

    def _present(self, run: Run, steps: list[str] | None = None, *, view: Any = None, wait: bool = True) -> None:
        """Show the run under this cell; where nobody is there, wait for it and leave the static view."""
        from . import view as views

        if bridge.somebody():
            views.show(run, steps, mode=view)
            return
        try:
            if wait:
                views.follow_lines(run)
        finally:
            views.show_static(run, steps)

    def _display_table(self, head: list[str], rows: list[list[str]], note: str) -> None:
        from ..render import html

        plain = "\n".join([*text.table([head, *rows]), "", note])
        self._display(plain, html.rows_html(head, rows, note))

    def _display(self, plain: str, rich: str) -> None:
        self._shell.display_pub.publish(data={"text/plain": str(plain), "text/html": rich})


_PLACED = {
    "added": "is added.",
    "kept": "is there already, the same as now; nothing was changed.",
    "replaced": "was there already; it is replaced, and keeps its place.",
}
_QUESTION = re.compile(r"%cm\s+(?:reject|answer)\s.*\?\s*$")


def keep_questions(lines: list[str]) -> list[str]:
    """Let the person's words end in a question mark: IPython takes such a line for a request for help.

    One of its input transformers; the bodies of cell magics are left as they are.
    """
    if lines and lines[0].startswith("%%"):
        return lines
    return [
        f"get_ipython().run_line_magic('cm', {line.strip().partition(' ')[2].strip()!r})\n"
        if _QUESTION.match(line)
        else line
        for line in lines
    ]


def _words(values: Mapping[str, Any], body: str | None) -> str:
    """The person's own words: the rest of the line, and the body."""
    return "\n".join(filter(None, (values.get("words"), body)))


def show_pending(error: GatePending) -> list[str]:
    """What stands for the traceback of a result that was read too early: one sentence, and the gate again."""
    run = error.run
    shown = vars(error).get("shown", False)
    vars(error)["shown"] = True  # IPython asks for the lines more than once
    if run is not None and (run.gates or run.status == "running") and bridge.somebody() and not shown:
        from . import pending

        with contextlib.suppress(CodeMachineError):
            pending.show_bar(run, error.gate, error.step)
    return [str(error)]
