use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn limits() -> Limits {
    Limits { min_ready: 2, max: 4, idle: SECOND * 10, age: SECOND * 100, wait: SECOND }
}

fn fill(pool: &mut Pool<(), char>, now: Instant) {
    while let Some(number) = pool.wanted(now) {
        pool.made(Item { number, thing: (), made: now }, now);
    }
}

fn counts(pool: &Pool<(), char>) -> (usize, usize) {
    let shown = pool.shown();
    (shown.ready, shown.ready + shown.making + shown.in_use)
}

#[test]
fn the_best_of_what_is_ready_is_taken_and_of_equals_the_last() {
    let now = Instant::now();
    let mut pool: Pool<u32, char> = Pool::new(Limits { min_ready: 4, ..limits() });
    for rank in [1, 3, 3, 0] {
        let number = pool.wanted(now).expect("a place");
        pool.made(Item { number, thing: rank, made: now }, now);
    }
    let mut take = || pool.take_best(now, |rank| *rank).map(|item| (item.number, item.thing));
    assert_eq!(
        [take(), take(), take(), take(), take()],
        [Some((2, 3)), Some((1, 3)), Some((0, 1)), Some((3, 0)), None]
    );
}

#[test]
fn so_many_are_kept_ready_and_no_more_than_the_most_are_made() {
    let now = Instant::now();
    let mut pool = Pool::new(limits());
    fill(&mut pool, now);
    assert_eq!(counts(&pool), (2, 2));
    let mut used = Vec::new();
    for who in ['a', 'b', 'c', 'd', 'e'] {
        used.extend(pool.take(now).or_else(|| {
            pool.wait(who, now);
            fill(&mut pool, now);
            pool.serve(now).map(|(_, item)| item)
        }));
        if who == 'b' {
            fill(&mut pool, now);
        }
    }
    let numbers: Vec<u32> = used.iter().map(|item| item.number).collect();
    assert_eq!((numbers.len(), counts(&pool)), (4, (0, 4)));
    assert_eq!(pool.too_late(now), []);
    assert_eq!(pool.next_look(), Some(now + SECOND));
    assert_eq!(pool.too_late(now + SECOND), ['e']);
    // One comes back: who waits gets it.
    pool.wait('f', now);
    let item = used.remove(2);
    let number = item.number;
    assert!(pool.put_back(item, now).is_none());
    let (who, item) = pool.serve(now).unwrap();
    assert_eq!((who, item.number), ('f', number));
    assert!(pool.serve(now).is_none());
    let expected = Counters { made: 4, hits: 4, misses: 1, waited: 2, late: 1, expired: 0, failed: 0 };
    assert_eq!(pool.shown().counters, expected);
}

#[test]
fn the_lowest_free_number_is_given_and_an_adopted_one_is_not() {
    let now = Instant::now();
    let mut pool: Pool<(), char> = Pool::new(limits());
    pool.adopt(1);
    assert_eq!(pool.wanted(now), Some(0));
    pool.made(Item { number: 0, thing: (), made: now }, now);
    assert_eq!((pool.wanted(now), pool.adopt_any()), (Some(2), 3));
    pool.freed(0);
    assert_eq!(pool.order(), Some(0));
    assert_eq!(pool.order(), None, "all four places are taken");
    assert_eq!(pool.adopt_any(), 4, "what is there is there");
}

#[test]
fn one_is_made_after_the_other_unless_somebody_waits() {
    let now = Instant::now();
    let mut pool: Pool<(), char> = Pool::new(limits());
    assert!(pool.wanted(now).is_some() && pool.wanted(now).is_none());
    pool.wait('a', now);
    pool.wait('b', now);
    assert!(pool.wanted(now).is_some() && pool.wanted(now).is_some() && pool.wanted(now).is_none());
}

#[test]
fn what_is_idle_or_old_goes() {
    let now = Instant::now();
    let mut pool: Pool<(), char> = Pool::new(limits());
    for number in 0..3 {
        pool.adopt(number);
        pool.put_back(Item { number, thing: (), made: now }, now);
    }
    assert_eq!(pool.expired(now + SECOND * 9).len(), 0);
    let gone = pool.expired(now + SECOND * 10);
    assert_eq!(gone.iter().map(|item| item.number).collect::<Vec<_>>(), [0], "two stay ready");
    assert_eq!(pool.expired(now + SECOND * 99).len(), 0);
    let late = now + SECOND * 100;
    assert!(pool.take(late).is_none(), "too old, though nobody has looked yet");
    assert_eq!(pool.expired(late).len(), 2, "however few there are");
    assert!(pool.put_back(Item { number: 3, thing: (), made: now }, late).is_some(), "it is not used again");
    assert_eq!(pool.shown().counters.expired, 4);
}

#[test]
fn who_waits_no_longer_gets_nothing() {
    let now = Instant::now();
    let mut pool: Pool<(), char> = Pool::new(limits());
    pool.wait('a', now);
    pool.wait('b', now);
    assert!(pool.forget(&'a') && !pool.forget(&'a'));
    fill(&mut pool, now);
    assert_eq!(pool.serve(now).map(|(who, _)| who), Some('b'));
}

#[test]
fn one_that_is_of_use_to_nobody_else_is_made_to_order() {
    let now = Instant::now();
    let mut pool: Pool<(), char> = Pool::new(Limits { min_ready: 0, max: 1, ..limits() });
    assert_eq!(pool.wanted(now), None, "a pool that is off makes nothing beforehand");
    assert!(pool.take(now).is_none());
    let number = pool.order().unwrap();
    pool.delivered();
    assert!(pool.take(now).is_none() && pool.order().is_none());
    pool.wait('a', now);
    assert!(pool.next_order().is_none());
    pool.freed(number);
    assert_eq!(pool.next_order(), Some(('a', number)));
    let expected = Counters { made: 1, misses: 2, waited: 1, ..Counters::default() };
    assert_eq!(pool.shown().counters, expected);
}

#[test]
fn failures_are_followed_by_ever_longer_pauses_until_somebody_gets_one() {
    let mut now = Instant::now();
    let mut pool: Pool<(), char> = Pool::new(limits());
    for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
        let number = pool.wanted(now).unwrap();
        pool.failed(number, "no room".to_string(), now);
        assert_eq!(pool.shown().problem.as_deref(), Some("no room"));
        assert!(pool.wanted(now).is_none());
        assert_eq!(pool.next_look(), Some(now + SECOND * pause));
        now += SECOND * pause;
    }
    // Who comes meanwhile does not wait for the end of a pause.
    let number = pool.wanted(now).unwrap();
    pool.failed(number, "no room".to_string(), now);
    pool.wait('a', now);
    let number = pool.wanted(now).unwrap();
    pool.made(Item { number, thing: (), made: now }, now);
    assert_eq!(pool.shown().problem, None);
    assert!(pool.serve(now).is_some());
    pool.broke("it ended".to_string(), now);
    assert_eq!(pool.next_look(), Some(now + SECOND), "somebody got one");
    assert_eq!(pool.shown().counters.failed, 10);
}

#[test]
fn what_breaks_while_it_is_ready_is_taken_out() {
    let now = Instant::now();
    let mut pool: Pool<u8, char> = Pool::new(limits());
    for thing in [7, 8] {
        let number = pool.wanted(now).unwrap();
        pool.made(Item { number, thing, made: now }, now);
    }
    assert_eq!(pool.lost(|thing| *thing == 7).map(|item| item.number), Some(0));
    assert!(pool.lost(|thing| *thing == 7).is_none());
    assert_eq!(pool.ready().copied().collect::<Vec<_>>(), [8]);
    assert_eq!(pool.shown().in_use, 1, "until it is destroyed");
    pool.freed(0);
    assert_eq!(pool.drain().len(), 1);
    assert_eq!(pool.wanted(now), None, "a drained pool is not filled again");
}

#[test]
fn one_that_was_made_and_is_of_no_use_has_its_number_until_it_is_gone() {
    let now = Instant::now();
    let mut pool: Pool<(), char> = Pool::new(limits());
    assert_eq!(pool.wanted(now), Some(0));
    pool.spoiled("nobody watches it".to_string(), now);
    let shown = pool.shown();
    assert_eq!((shown.ready, shown.making, shown.in_use, shown.counters.failed), (0, 0, 1, 1));
    assert_eq!(shown.problem.as_deref(), Some("nobody watches it"));
    assert_eq!(pool.wanted(now), None, "it pauses");
    assert_eq!(pool.wanted(now + SECOND), Some(1), "the place is not free yet");
    pool.freed(0);
    assert_eq!(pool.shown().in_use, 0);
}
