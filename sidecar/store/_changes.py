"""Applies the commands of one batch to the loaded rows, and links their records to the chain. Does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, TypeGuard

from sidecar.core.apply import apply
from sidecar.core.brakes import groups_containing
from sidecar.core.chain import link
from sidecar.core.command import AcceptClock, Admit, Bind, Command, Issue, Reply, Switch, Turn
from sidecar.core.freeze import Freeze
from sidecar.core.idempotency import Claimed
from sidecar.core.record import CausalRole, Entry
from sidecar.core.scope import Execution, Scope
from sidecar.core.state import State
from sidecar.files.jsonvalue import dumps
from sidecar.store._admission_cache import Grown, Overlaid
from sidecar.store.base import Bindings, ChainHead, Changes, LogRow

# The most bindings that one record names, because the size of a record must be bounded.
MAX_BINDINGS = 1_000
_NO_BINDINGS: Bindings = MappingProxyType({})

# Masks a record, given as `Record.to_dict()`, before it is serialized.
Masking = Callable[[dict[str, Any]], dict[str, Any]]


def apply_all(
    commands: Sequence[Command],
    state: State,
    head: ChainHead,
    now: int,
    replies: list[Reply],
    mask: Masking | None = None,
) -> tuple[Changes, ChainHead]:
    """Apply commands in order, each to the state that the one before left. Link their records to the
    chain."""
    scopes = dict(state.scopes)
    executions = Overlaid(state.executions)
    admissions = {group: Grown(found) for group, found in state.admissions.items()}
    kept = set(state.kept)
    on = set(state.on)
    unbound = {request_id: list(seqs) for request_id, seqs in state.unbound.items()}
    claimed = dict(state.claimed)
    freezes = dict(state.freezes)
    running = State(
        scopes=scopes,
        executions=executions,
        admissions=admissions,
        found=state.found,
        kept=kept,
        on=on,
        unbound=unbound,
        claimed=claimed,
        freezes=freezes,
    )
    issued: dict[str, Scope] = {}
    changed_scopes: dict[str, Scope] = {}
    admitted: dict[str, Execution] = {}
    ended: dict[str, Execution] = {}
    log: list[LogRow] = []
    newly_kept: list[tuple[bytes, str]] = []
    turned: dict[Switch, Turn] = {}
    bound: list[tuple[int, Bind]] = []
    changed_claims: dict[bytes, Claimed] = {}
    changed_freezes: dict[str, Freeze] = {}
    unlogged, logged = dict(head.unlogged), dict[int, str]()
    seq, hash_ = head.seq, head.hash
    for command in commands:
        applied = apply(command, running, now)
        replies.append(applied.reply)
        if applied.scope is not None:
            scope_id = applied.scope.scope_id
            changed = issued if isinstance(command, Issue) or scope_id in issued else changed_scopes
            scopes[scope_id] = changed[scope_id] = applied.scope
        if applied.execution is not None:
            execution = applied.execution
            name = execution.decision_id
            executed = admitted if isinstance(command, Admit) or name in admitted else ended
            executions[name] = executed[name] = execution
            if admissions and isinstance(command, Admit):
                for group in groups_containing(execution):
                    if group in admissions:
                        admissions[group].append(name)
        if applied.claimed is not None:
            key = applied.claimed.key
            claimed[key] = changed_claims[key] = applied.claimed
        if applied.entry is not None:
            seq += 1
            bindings = dict(islice(unlogged.items(), MAX_BINDINGS))
            for bound_seq in bindings:
                del unlogged[bound_seq]
            logged |= bindings
            envelope = canonical(applied.entry, head.writer, seq, mask, kept=applied.kept, bindings=bindings)
            hash_ = link(hash_, envelope)
            log.append(LogRow(seq, applied.entry, envelope, hash_))
            record = applied.entry.record
            if applied.kept is not None:
                kept.add(applied.kept)
                newly_kept.append((applied.kept, record.decision_id))
            waits_for_run = record.causal_role is CausalRole.PRE_RUN and record.run_id is None
            if waits_for_run and record.request_id in unbound:
                unbound[record.request_id].append(seq)
        if applied.turned is not None:
            (on.add if applied.turned.on else on.discard)(applied.turned.switch)
            turned[applied.turned.switch] = applied.turned
        if applied.freeze is not None:
            freeze_id = applied.freeze.freeze_id
            freezes[freeze_id] = changed_freezes[freeze_id] = applied.freeze
        if applied.bound is not None:
            bound += [(of_request, applied.bound) for of_request in unbound[applied.bound.request_id]]
            unlogged |= dict.fromkeys(unbound[applied.bound.request_id], applied.bound.run_id)
            unbound[applied.bound.request_id].clear()
    changes = Changes(
        now=now,
        issued=list(issued.values()),
        scopes=list(changed_scopes.values()),
        admitted=list(admitted.values()),
        executions=list(ended.values()),
        log=log,
        kept=newly_kept,
        turned=list(turned.values()),
        bound=bound,
        logged=list(logged),
        stepped=sum(command.before - now for command in commands if _steps_back(command, now)),
        claimed=list(changed_claims.values()),
        freezes=list(changed_freezes.values()),
    )
    return changes, ChainHead(head.writer, seq, hash_, now if log else head.time, unlogged)


def _steps_back(command: Command, now: int) -> TypeGuard[AcceptClock]:
    return isinstance(command, AcceptClock) and command.before > now


def canonical(
    entry: Entry,
    writer: str,
    seq: int,
    mask: Masking | None = None,
    *,
    kept: bytes | None = None,
    bindings: Bindings = _NO_BINDINGS,
) -> bytes:
    """The bytes of an envelope: JSON with sorted keys and no white space. They are serialized only once.

    The envelope also names what the record changes in tables beside the log: the key under which the record
    is kept once, and the bindings made since the record before. Both stand outside `record`, so a mask does
    not touch them.
    """
    envelope = entry.envelope(writer, seq)
    if kept is not None:
        envelope["kept_once"] = kept.hex()
    if bindings:
        envelope["run_bindings"] = [[*binding] for binding in bindings.items()]
    if mask is not None:
        envelope["record"] = mask(envelope["record"])
    return dumps(envelope, sort_keys=True)
