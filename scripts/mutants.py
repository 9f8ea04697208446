#!/usr/bin/env python3
"""Checks the simulation: breaks one ordering rule of the product at a time, and counts the runs until the
simulation finds it. The unchanged product must pass as many runs first.

Usage: scripts/mutants.py [NAME ...]. Works on a copy of the repository, with the profile `sim`.
Environment: RUNS, most runs for each mutant (default 2000); MUTANTS_DIR, the directory of the copy.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = int(os.environ.get("RUNS", "2000"))

# Each: name, file, text, replacement.
MUTANTS = [
    (
        "a job enters the table after its send",
        "src/dispatch/dispatcher.rs",
        "        self.0.in_flight.enter(&job, held).map_err(|_| SubmitError::Overloaded)?;\n"
        "        self.send_first(job)",
        "        let (table, later) = (Arc::clone(&self.0.in_flight), job.clone());\n"
        "        ambient::spawn(async move {\n"
        "            tokio::time::sleep(Duration::from_millis(50)).await;\n"
        "            let _ = table.enter(&later, held);\n"
        "        });\n"
        "        self.send_first(job)",
    ),
    (
        "a job enters the journal after its send",
        "src/dispatch/batcher/sender.rs",
        "        let results = match self.enter(&mut batch).await {\n"
        "            Ok(()) => self.send_now(&jobs).await,",
        "        let sent = self.send_now(&jobs).await;\n"
        "        let results = match self.enter(&mut batch).await {\n"
        "            Ok(()) => sent,",
    ),
    (
        "a job leaves the journal although its row is not written",
        "src/audit/writer.rs",
        "        let results = self.put_rows(&mut batch).await;",
        "        let results = self.put_rows(&mut batch).await.into_iter().map(|_| Ok(())).collect();",
    ),
    (
        "an ended job counts again when its end is repeated",
        "src/backend/aws/redis/journal_end.lua",
        "  if held[i] and not seen[id] and (not is_shared or is_first(id)) then",
        "  if not seen[id] then",
    ),
    (
        "202 before the queue has confirmed the job",
        "src/runs.rs",
        "        outcome_of(sending).await.map_err(RunError::Submit)?;\n        Ok(RunOutcome::Accepted(id))",
        "        drop(sending);\n        Ok(RunOutcome::Accepted(id))",
    ),
    (
        "sums get a new number for each attempt to post them",
        "src/backend/aws/redis/journal_number.lua",
        "  if sums and not numbered then",
        "  if numbered then\n"
        "    last, drawn = last + 1, true\n"
        "    numbered = string.format('%.0f:', last) .. string.match(numbered, ':(.*)')\n"
        "    redis.call('HSET', KEYS[2], name, numbered)\n"
        "  end\n"
        "  if sums and not numbered then",
    ),
    (
        "jobs are admitted without the lease",
        "src/dispatch/journal.rs",
        "        if !self.lease.holds() {\n            return Err(BackendError::Unavailable(",
        "        if false {\n            return Err(BackendError::Unavailable(",
    ),
    (
        "the claim of a failed send is not released",
        "src/runs/idempotency.rs",
        "            Err(_) => self.release(claim, attempt).await,",
        "            Err(_) => Ok(()),",
    ),
    (
        "the ledger adds its copy of the sums twice",
        "src/audit/ledger.rs",
        "            *books.sums.entry(account.clone()).or_default() += adds;",
        "            *books.sums.entry(account.clone()).or_default() += adds;\n"
        "            *books.sums.entry(account.clone()).or_default() += adds;",
    ),
    (
        "the sums of an adopted node are not taken over",
        "src/fleet/adoption.rs",
        "        let sums = self.take_over(node).await?;",
        "        let sums = 0;",
    ),
    (
        "a restore forgets the jobs in flight",
        "src/fleet/adoption.rs",
        "        let moving = || self.jobs.of_node(node);",
        "        let moving = || (Vec::new(), Vec::new());",
    ),
    (
        "a restore forgets the ended jobs",
        "src/audit/ledger.rs",
        "            ended: held.collect(),",
        "            ended: held.take(0).collect(),",
    ),
    (
        "sums are numbered while the outcome of an end is unknown",
        "src/audit/ledger.rs",
        "        match self.books().unsure.contains(&node) {",
        "        match false && self.books().unsure.contains(&node) {",
    ),
    (
        "LOST after a look-up that was not answered",
        "src/dispatch/settler.rs",
        "awaited.deadline < now_ms() && !failed.contains(&due.id) && !awaited.is_unsent =>",
        "awaited.deadline < now_ms() && !awaited.is_unsent =>",
    ),
    (
        "late results are ignored",
        "src/dispatch/in_flight.rs",
        "        let (function, life) = self.given_up.settle(id)?;",
        "        let (function, life) = self.given_up.settle(id).filter(|_| false)?;",
    ),
    (
        "results are not looked up",
        "src/dispatch/settler.rs",
        "        for (id, payload) in ids.iter().zip(found) {",
        "        for (id, payload) in ids.iter().zip(found).take(0) {",
    ),
    (
        "a send without an answer counts as not sent",
        "src/dispatch/batcher/sender.rs",
        "        pending.maybe_sent |= matches!(error, SendError::Unknown(_));",
        "        pending.maybe_sent |= false;",
    ),
    (
        "a repeat sends although another attempt was claimed first",
        "src/runs/idempotency.rs",
        "        if !self.0.claims.try_again(before, attempt_id).await.map_err(unavailable)? {\n"
        "            return Ok(None);\n        }",
        "        let _ = self.0.claims.try_again(before, attempt_id).await.map_err(unavailable)?;",
    ),
    (
        "a job in flight counts as confirmed (8109cd5)",
        "src/runs/idempotency.rs",
        "        Ok(before.is_sent.then_some(KnownState::Pending(place)))",
        "        Ok((before.is_sent || place.is_some()).then_some(KnownState::Pending(place)))",
    ),
    (
        "an empty Redis answers that nothing is to be posted (8109cd5)",
        "src/backend/aws/redis/journal_number.lua",
        "if redis.call('EXISTS', KEYS[4]) == 0 then return false end",
        "",
    ),
    (
        "an empty Redis ends jobs",
        "src/backend/aws/redis/journal_end.lua",
        "if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end",
        "",
    ),
    (
        "dead nodes are not adopted",
        "src/fleet/adoption.rs",
        "                    self.to_give_back.retain(|id| id.node() != node);\n"
        "                    self.adopt(store, node).await?;",
        "                    self.to_give_back.retain(|id| id.node() != node);",
    ),
    (
        "a dead node leaves the list with its jobs",
        "src/backend/aws/redis/membership.rs",
        "            if len > 0 {\n                return Ok(false);",
        "            if len > 1_000_000 {\n                return Ok(false);",
    ),
    (
        "a job leaves the table when its result arrives",
        "src/dispatch/settler.rs",
        "                if self.record(id, row, exit_code, recommendation, kept, is_shared) {\n",
        "                if self.record(id, row, exit_code, recommendation, kept, is_shared) {\n"
        "                    self.in_flight.remove(id);\n",
    ),
    (
        "the journal of this node is not read at the start",
        "src/fleet/adoption.rs",
        "        let restored = self.restore(&entries, usize::MAX);",
        "        let restored = 0; let _ = &entries; self.read_own_at = None;",
    ),
    (
        "a job that several nodes have sent counts each time it enters",
        "src/backend/aws/redis/journal_end.lua",
        "(not is_shared or is_first(id))",
        "true",
    ),
    (
        "a late result takes its job out of the table before the LOST row is written",
        "src/audit/batch.rs",
        "        rows.filter(|(_, origin)| !origin.is_late).map(|(id, _)| *id).collect()",
        "        rows.map(|(id, _)| *id).collect()",
    ),
    (
        "a job of an incomplete journal is sent again without an entry",
        "src/dispatch/dispatcher.rs",
        "        let is_entered = resend.maybe_sent && !resend.is_journaled;",
        "        let is_entered = false;",
    ),
    (
        "a new connection to Redis does not close the former one",
        "src/backend/aws/redis/connection.rs",
        "            self.close(connection, &former).await?;",
        "",
    ),
    (
        "rows of shared jobs are written unconditionally",
        "src/audit/writer.rs",
        "        is_late || is_shared || batch.rows[n].is_lost() || self.lease.is_shared_since(since)",
        "        let _ = (is_late, is_shared, since);\n        false",
    ),
    (
        "the owner of a job is not told that another node sends it again",
        "src/dispatch/dispatcher.rs",
        "            membership.entrust(node).await.map_err(|_| SubmitError::Unavailable)?;",
        "            let _ = membership;",
    ),
    (
        "the connection of a dead process is not closed",
        "src/backend/aws/redis/membership.rs",
        "            self.commands.close_recorded(&key(LINK, node)).await?;",
        "",
    ),
    (
        "a late result counts before it is stored",
        "src/dispatch/settler.rs",
        "        if !is_late {",
        "        if true {",
    ),
    (
        "a node changes the journal of another one without a mark",
        "src/audit/record.rs",
        "            Some(membership) if node != self.node => membership.entrust(node).await,",
        "            Some(membership) if node != self.node && false => membership.entrust(node).await,",
    ),
    (
        "a marked node leaves the list",
        "src/backend/aws/redis/membership.rs",
        "if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end\nlocal time",
        "local time",
    ),
    (
        "a node that stood still restores a journal that another one has restored",
        "src/backend/aws/redis/membership.rs",
        "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end\nredis.call('HSET'",
        "redis.call('HSET'",
    ),
    (
        "the copy of sums stays beside their number when an answer was lost",
        "src/audit/ledger.rs",
        "        books.sums.retain(|(of, _), _| *of != node);\n",
        "",
    ),
    (
        "replayed rows are handed to the ledger twice",
        "src/audit/replay.rs",
        "        self.ledger.take(done);\n        blocking(move || disk.waiting",
        "        let rows = done.ids.iter().zip(&done.rows).zip(&done.origins);\n"
        "        let twice = rows.map(|((id, row), origin)| Record {\n"
        "            id: *id,\n            row: row.clone(),\n            recommendation: None,\n"
        "            kept: None,\n            is_late: origin.is_late,\n"
        "            is_shared: origin.is_shared,\n"
        "            since: origin.since,\n            counted: 0,\n        });\n"
        "        self.ledger.take(batch_of(twice));\n"
        "        self.ledger.take(done);\n        blocking(move || disk.waiting",
    ),
    (
        "a node does not expect others to send its jobs again",
        "src/dispatch/in_flight/entry.rs",
        "        self.shared || may_be_resent()",
        "        let _ = may_be_resent;\n        self.shared",
    ),
    (
        "an adopted node is forgotten when Redis loses the list",
        "src/fleet/adoption.rs",
        "            if store.relist(node).await? {\n"
        "                self.mend(store, node).await?;\n"
        "            } else {\n"
        "                self.adopted.remove(&node);",
        "            self.adopted.remove(&node);\n            if store.relist(node).await? {\n"
        "                self.mend(store, node).await?;\n            } else {",
    ),
    (
        "a node that stood still removes unsent jobs that another one has adopted",
        "src/dispatch/journal.rs",
        "        if must_stay {",
        "        if must_stay && false {",
    ),
    (
        "a row on the disk forgets that another node may write it too",
        "src/audit/spill/segment.rs",
        "            is_shared: record.is_shared,",
        "            is_shared: false,",
    ),
    (
        "a job that is sent again leaves the journal",
        "src/dispatch/journal.rs",
        "        leaves.retain(|leaving| !is_kept(leaving.id));",
        "        leaves.retain(|leaving| !is_kept(leaving.id) || true);",
    ),
    (
        "a node is not told that it was adopted",
        "src/fleet/adoption.rs",
        ".is_some_and(|before| before != adoptions);",
        ".is_some_and(|before| before != adoptions && false);",
    ),
    (
        "a failed resend keeps its job from leaving",
        "src/dispatch/in_flight.rs",
        "            (entry.unsent, entry.resending) = (true, false);",
        "            entry.unsent = true;",
    ),
    (
        "rows of a full queue are dropped",
        "src/dispatch/settler.rs",
        "        self.in_flight.unsettle(id);\n"
        "        self.metrics.results.with_label_values(&[\"deferred\"]).inc();\n"
        "        false",
        "        self.in_flight.remove(id);\n        false",
    ),
]


def main():
    wanted = sys.argv[1:]
    work = pathlib.Path(os.environ.get("MUTANTS_DIR") or tempfile.mkdtemp(prefix="mutants-"))
    missed = []
    copy(work)
    unchanged, why = simulate(work)
    if unchanged != "not found":
        sys.exit(f"the unchanged product fails: {unchanged} {why}")
    print("| mutant | runs until found | first violation |\n|---|---:|---|", flush=True)
    for name, file, text, replacement in MUTANTS:
        if wanted and not any(part in name for part in wanted):
            continue
        found, why = runs_until_found(work, file, text, replacement)
        print(f"| {name} | {found} | {why} |", flush=True)
        if not found.isdigit():
            missed.append(name)
    if missed:
        sys.exit(f"not found: {missed}")


def copy(work):
    """Copies the files of the repository that differ, so that a build repeats only what has changed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout.split("\0")
    names = {name for name in listed if name and (ROOT / name).is_file()}
    for name in names:
        source, target = (ROOT / name).read_bytes(), work / name
        if not target.is_file() or target.read_bytes() != source:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source)
    for file in work.rglob("*.rs"):
        name = file.relative_to(work)
        if name.parts[0] != "target" and str(name) not in names:
            file.unlink()


def runs_until_found(work, file, text, replacement):
    copy(work)
    path = work / file
    source = path.read_text()
    if source.count(text) != 1:
        return "text not found", ""
    path.write_text(source.replace(text, replacement))
    return simulate(work)


def simulate(work):
    command = ["cargo", "test", "--locked", "--profile", "sim", "--lib", "simulation::a_fleet", "--"]
    command += ["--nocapture"]
    environment = {**os.environ, "SIM_RUNS": str(RUNS), "SIM_SEED": "1", "SIM_SHORTEN": "0"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if "error: could not compile" in done.stderr:
        return "does not compile", ""
    first = re.search(r"first failure: seed (\d+)", done.stdout)
    if not first:
        return "not found", ""
    seed = first.group(1)
    violation = re.search(rf"=== seed {seed}:.*?^  (\S.*?)$", done.stdout, re.DOTALL | re.MULTILINE)
    return seed, violation.group(1)[:100].replace("|", "/") if violation else ""


if __name__ == "__main__":
    main()
