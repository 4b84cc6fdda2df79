use super::*;
use crate::vmm::devices::driver::Seed;

fn task(id: &str, interval_ms: u64) -> Task {
    Task {
        id: id.into(),
        plugin: "p".into(),
        device: Default::default(),
        config: Default::default(),
        labels: Default::default(),
        interval: Duration::from_millis(interval_ms),
        timeout: Duration::from_millis(interval_ms),
        priority: 0,
        retries: 0,
    }
}

fn with(tasks: Vec<Task>, now: u64) -> Schedule {
    let mut schedule = Schedule::new(100);
    schedule.replace(&TaskSet { version: 1, tasks }, now);
    schedule
}

/// Runs the clock to `until`; gives what was to be done, with the time.
fn drive(schedule: &mut Schedule, until: u64) -> Vec<(u64, Action)> {
    let mut all = Vec::new();
    while let Some(at) = schedule.wake_at().filter(|&at| at <= until) {
        while let Some(action) = schedule.poll(at) {
            all.push((at, action));
        }
    }
    all
}

/// As `drive`, and every run succeeds after `takes` milliseconds.
fn starts(schedule: &mut Schedule, until: u64, takes: u64) -> Vec<u64> {
    let mut all = Vec::new();
    while let Some(at) = schedule.wake_at().filter(|&at| at <= until) {
        while let Some(action) = schedule.poll(at) {
            if let Action::Start(start) = action {
                all.push(at);
                schedule.finish(start.run, Ok(1), false, at + takes);
            }
        }
    }
    all
}

#[test]
fn slots_lie_on_one_line_however_long_runs_take() {
    let mut schedule = with(vec![Task { timeout: Duration::from_secs(5), ..task("a", 60_000) }], 1_000_000);
    let at = starts(&mut schedule, 5_000_000, 59_999);
    assert!(at[0] <= 1_000_000 + FIRST_WITHIN || at[0] % 60_000 == offset("a", 60_000));
    let line = offset("a", 60_000);
    assert!(at.len() > 60);
    assert!(at[1..].iter().all(|at| at % 60_000 == line), "{at:?}");
}

#[test]
fn a_new_task_does_not_wait_for_a_long_interval_to_pass() {
    for id in ["a", "b", "c", "d"] {
        let daily = Task { timeout: Duration::from_secs(60), ..task(id, 86_400_000) };
        let at = starts(&mut with(vec![daily], 5), FIRST_WITHIN + 10, 1);
        assert_eq!(at.len(), 1);
    }
}

#[test]
fn offsets_are_stable_and_spread() {
    // A change of these moves every fleet's load at an upgrade.
    assert_eq!([offset("a", 60_000), offset("task-1", 60_000)], [38300, 12837]);
    let mut buckets = [0u32; 60];
    (0..6000).for_each(|n| buckets[(offset(&format!("switch-{n}"), 60_000) / 1000) as usize] += 1);
    assert!(buckets.iter().all(|&count| (50..170).contains(&count)), "{buckets:?}");
}

#[test]
fn a_queued_task_is_not_submitted_again_and_its_slots_are_counted() {
    let mut schedule = Schedule::new(1);
    let tasks = vec![task("long", 1_000), task("waits", 1_000)];
    schedule.replace(&TaskSet { version: 1, tasks }, 0);
    let mut first = None;
    let mut skipped: BTreeMap<(String, &str), u64> = BTreeMap::new();
    for (_, action) in drive(&mut schedule, 10_000) {
        match action {
            Action::Start(start) => assert!(first.replace(start).is_none(), "two runs with room for one"),
            Action::Skipped { task, reason, slots } => *skipped.entry((task.id.clone(), reason)).or_default() += slots,
            Action::Expire(_) => {}
        }
    }
    let first = first.unwrap();
    let other = if first.task.id == "long" { "waits" } else { "long" };
    assert!(skipped[&(first.task.id.clone(), STILL_RUNNING)] >= 8, "{skipped:?}");
    assert!(skipped[&(other.to_string(), NO_ROOM)] >= 8, "{skipped:?}");
    schedule.finish(first.run, Ok(0), false, 10_001);
    assert!(matches!(schedule.poll(10_001), Some(Action::Start(start)) if start.task.id == other));
}

#[test]
fn the_higher_priority_goes_first() {
    let mut schedule = Schedule::new(1);
    let tasks = (0..5).map(|n| Task { priority: n, ..task(&format!("t{n}"), 1_000) }).collect();
    schedule.replace(&TaskSet { version: 1, tasks }, 0);
    let mut order = Vec::new();
    // All are due by now.
    while let Some(action) = schedule.poll(999) {
        if let Action::Start(start) = action {
            order.push(start.task.priority);
            schedule.finish(start.run, Ok(0), false, 999);
        }
    }
    assert_eq!(order, [4, 3, 2, 1, 0]);
}

#[test]
fn a_deadline_is_told_once_and_the_task_goes_on() {
    let mut schedule = with(vec![Task { timeout: Duration::from_millis(300), ..task("a", 1_000) }], 0);
    let actions = drive(&mut schedule, 1_400);
    let (start_at, Action::Start(start)) = &actions[0] else { panic!("{actions:?}") };
    assert_eq!(start.deadline, start_at + 300);
    let expiries: Vec<_> =
        actions.iter().filter(|(_, a)| matches!(a, Action::Expire(run) if *run == start.run)).collect();
    assert_eq!(expiries.len(), 1);
    assert_eq!(expiries[0].0, start.deadline);
    let ended = schedule.finish(start.run, Err("timeout".into()), false, start.deadline).unwrap();
    assert_eq!(ended.duration, 300);
    let (_, state, _, counts) = schedule.tasks().next().unwrap();
    assert_eq!((state, counts.failed, counts.last_error.as_deref()), (State::Failed, 1, Some("timeout")));
    assert!(drive(&mut schedule, 3_000).iter().any(|(_, action)| matches!(action, Action::Start(_))));
}

#[test]
fn a_run_that_cannot_be_taken_back_blocks_only_its_own_task() {
    let mut schedule = with(vec![task("stuck", 1_000), task("fine", 1_000)], 0);
    let mut held = None;
    let mut fine = 0;
    while let Some(at) = schedule.wake_at().filter(|&at| at < 10_000) {
        while let Some(action) = schedule.poll(at) {
            let Action::Start(start) = action else { continue };
            if start.task.id == "stuck" {
                assert!(held.is_none(), "started while it was held");
                held = Some(start.run);
                schedule.finish(start.run, Err("no answer".into()), true, at + 900);
            } else {
                fine += 1;
                schedule.finish(start.run, Ok(1), false, at);
            }
        }
    }
    assert!(fine >= 9);
    schedule.release(held.unwrap());
    let next = drive(&mut schedule, 11_000);
    assert!(next.iter().any(|(_, action)| matches!(action, Action::Start(start) if start.task.id == "stuck")));
}

#[test]
fn a_failed_run_is_tried_again_but_never_costs_the_next_slot() {
    let mut schedule = with(vec![Task { retries: 9, ..task("a", 10_000) }], 0);
    let mut runs = Vec::new();
    while let Some(at) = schedule.wake_at().filter(|&at| at <= 40_000) {
        while let Some(action) = schedule.poll(at) {
            if let Action::Start(start) = action {
                runs.push((at, start.attempt));
                assert!(
                    start.attempt == 0
                        || start.deadline % 10_000 == offset("a", 10_000)
                        || start.deadline <= at + 10_000
                );
                schedule.finish(start.run, Err("refused".into()), false, at + 5);
            }
        }
    }
    let slots: Vec<u64> = runs.iter().filter(|(_, attempt)| *attempt == 0).map(|(at, _)| *at).collect();
    assert!(slots.len() >= 3);
    assert!(slots[1..].iter().all(|at| at % 10_000 == offset("a", 10_000)));
    // 1, 2 and 4 seconds after each other: a fourth would not be done before the slot.
    let second: Vec<_> =
        runs.iter().filter(|(at, _)| (slots[1]..slots[2]).contains(at)).map(|(at, n)| (at - slots[1], *n)).collect();
    assert_eq!(second, [(0, 0), (1_005, 1), (3_010, 2), (7_015, 3)]);
    let (_, _, _, counts) = schedule.tasks().next().unwrap();
    assert_eq!(counts.retries, runs.iter().filter(|(_, attempt)| *attempt > 0).count() as u64);
}

#[test]
fn a_suspended_machine_runs_each_task_once_and_counts_the_rest() {
    let mut schedule = with(vec![task("a", 1_000)], 0);
    starts(&mut schedule, 2_500, 1);
    let mut skipped = 0;
    let mut runs = 0;
    while let Some(action) = schedule.poll(102_500) {
        match action {
            Action::Start(start) => {
                runs += 1;
                schedule.finish(start.run, Ok(1), false, 102_501);
            }
            Action::Skipped { reason, slots, .. } => {
                assert_eq!(reason, LATE);
                skipped += slots;
            }
            Action::Expire(_) => panic!("nothing ran"),
        }
    }
    assert_eq!((runs, skipped), (1, 99));
}

#[test]
fn an_unchanged_task_keeps_its_run_and_a_changed_one_loses_it() {
    let tasks = vec![task("same", 1_000), task("changes", 1_000), task("goes", 1_000)];
    let mut schedule = with(tasks.clone(), 0);
    let started: Vec<_> = drive(&mut schedule, 999)
        .into_iter()
        .filter_map(|(_, a)| match a {
            Action::Start(start) => Some(start),
            _ => None,
        })
        .collect();
    assert_eq!(started.len(), 3);
    let changed = Task { retries: 1, ..tasks[1].clone() };
    let set = TaskSet { version: 2, tasks: vec![tasks[0].clone(), changed, task("new", 1_000)] };
    let changes = schedule.replace(&set, 1_000);
    let run_of = |id: &str| started.iter().find(|start| start.task.id == id).unwrap().run;
    let mut ended = changes.ended.clone();
    ended.sort();
    let mut expected = [run_of("changes"), run_of("goes")];
    expected.sort();
    assert_eq!(ended, expected);
    assert_eq!(changes.removed, ["goes"]);
    assert_eq!(changes.changed.len(), 2);
    assert!(schedule.finish(run_of("goes"), Ok(1), false, 1_001).is_none());
    assert!(schedule.finish(run_of("same"), Ok(1), false, 1_001).is_some());
}

#[test]
fn a_stopped_schedule_starts_nothing() {
    let mut schedule = with(vec![task("a", 1_000), task("b", 1_000)], 0);
    schedule.stop();
    assert!(drive(&mut schedule, 10_000).is_empty());
}

/// Random sets, run times, failures, held runs and reloads. Whatever happens: no two runs of a task overlap, no more
/// than the limit run at once, and every slot of an unchanged task is either run or counted as skipped.
#[test]
fn no_history_breaks_the_rules() {
    for seed in 0..80u64 {
        let mut random = Seed(seed);
        let limit = 1 + random.below(6) as usize;
        let mut schedule = Schedule::new(limit);
        let mut now = random.below(100_000);
        let tasks: Vec<Task> = (0..1 + random.below(8))
            .map(|n| Task {
                timeout: Duration::from_millis(50 + random.below(900)),
                retries: random.below(3) as u32,
                priority: random.below(3) as u8,
                ..task(&format!("t{n}"), 1_000 * (1 + random.below(5)))
            })
            .collect();
        let began = now;
        schedule.replace(&TaskSet { version: 1, tasks: tasks.clone() }, now);
        let firsts: HashMap<String, u64> = schedule.entries.values().map(|e| (e.task.id.clone(), e.due)).collect();
        let mut under_way: HashMap<RunId, (String, u64)> = HashMap::new();
        let mut busy: BTreeSet<String> = BTreeSet::new();
        let mut held: Vec<(RunId, String)> = Vec::new();
        let mut slots: HashMap<String, u64> = HashMap::new();
        for _ in 0..2_000 {
            now += random.below(400);
            while let Some(action) = schedule.poll(now) {
                match action {
                    Action::Start(start) => {
                        assert!(busy.insert(start.task.id.clone()), "seed {seed}: two runs of {}", start.task.id);
                        assert!(start.deadline > now && start.deadline <= now + millis(start.task.timeout));
                        if start.attempt == 0 {
                            *slots.entry(start.task.id.clone()).or_default() += 1;
                        }
                        under_way.insert(start.run, (start.task.id.clone(), start.deadline));
                    }
                    Action::Skipped { task, slots: count, .. } => *slots.entry(task.id.clone()).or_default() += count,
                    Action::Expire(run) => {
                        let (id, deadline) = under_way.remove(&run).unwrap();
                        assert!(now >= deadline, "seed {seed}");
                        let stuck = random.below(4) == 0;
                        assert!(schedule.finish(run, Err("deadline".into()), stuck, now).is_some());
                        if stuck { held.push((run, id)) } else { assert!(busy.remove(&id)) }
                    }
                }
            }
            assert!(under_way.len() <= limit, "seed {seed}");
            assert_eq!(schedule.under_way(), under_way.len());
            let done: Vec<RunId> = under_way.keys().copied().filter(|_| random.below(3) == 0).collect();
            for run in done {
                let (id, _) = under_way.remove(&run).unwrap();
                let result = if random.below(3) == 0 { Err("failed".to_string()) } else { Ok(1) };
                assert!(schedule.finish(run, result, false, now).is_some());
                busy.remove(&id);
            }
            if random.below(5) == 0
                && let Some((run, id)) = held.pop()
            {
                schedule.release(run);
                busy.remove(&id);
            }
            if random.below(50) == 0 {
                // A reload of the same content disturbs nothing.
                schedule.replace(&TaskSet { version: 2, tasks: tasks.clone() }, now);
            }
            assert!(schedule.due.len() < 4 * tasks.len() + 200, "seed {seed}: {} events", schedule.due.len());
        }
        assert!(now > began);
        for task in &tasks {
            let (interval, first) = (millis(task.interval), firsts[&task.id]);
            let line = next_slot(task, first);
            let passed = if now < first { 0 } else { 1 + if now < line { 0 } else { (now - line) / interval + 1 } };
            let told = slots.get(&task.id).copied().unwrap_or(0);
            let waiting = u64::from(schedule.entries[&task.id].waiting.is_some_and(|wait| wait.attempt == 0));
            assert_eq!(told + waiting, passed, "seed {seed}: {} first {first} line {line} now {now}", task.id);
        }
    }
}
