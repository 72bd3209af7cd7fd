//! Tests of the map over tasks, on threads of our own and on a team.

#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use super::*;
use std::collections::HashSet;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::{Barrier, Mutex, mpsc};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(20);

/// The system's OpenMP runtime. Where there is none, the tests say so.
fn team() -> Option<Team> {
    let team = Team::find(Some(Path::new("libgomp.so.1"))).ok().flatten();
    if team.is_none() {
        writeln!(std::io::stderr(), "not tested: this system has no libgomp.so.1").unwrap();
    }
    team
}

/// The threads that work on a call of `threads` tasks, each of which waits until all of them have begun.
fn threads_at_work(threads: usize) -> HashSet<ThreadId> {
    let at_work = Mutex::new(HashSet::new());
    let start = Instant::now();
    map(threads, WORTH_A_TEAM, |_| {
        at_work.lock().unwrap().insert(std::thread::current().id());
        while at_work.lock().unwrap().len() < threads && start.elapsed() < LONG {
            std::thread::yield_now();
        }
        Ok(())
    })
    .unwrap();
    at_work.into_inner().unwrap()
}

#[test]
fn a_call_does_not_wait_for_the_workers_of_another() {
    set_num_threads(2).unwrap();
    let (started, finish) = (Barrier::new(3), Barrier::new(3));
    let (done, result) = mpsc::channel();
    std::thread::scope(|scope| {
        // Both threads of the pool hang in this call until the other one has come back.
        scope.spawn(|| {
            map(2, WORTH_A_THREAD, |_| {
                started.wait();
                finish.wait();
                Ok(())
            })
        });
        started.wait();
        scope.spawn(move || done.send(map(4, WORTH_A_THREAD, Ok)));
        let other = result.recv_timeout(LONG);
        finish.wait();
        assert_eq!(other.unwrap().unwrap(), [0, 1, 2, 3]);
    });
    let workers = pool::pool().unwrap().workers.unwrap();
    assert_eq!(workers.reserve(2).count, 1, "the worker is idle again");
}

#[test]
fn a_team_works_with_as_many_threads_as_the_host_says() {
    let Some(team) = team() else { return };
    for threads in [1, 2, 3, 2] {
        let found = hosted(Some(team), threads, || threads_at_work(threads));
        assert_eq!(found.len(), threads);
        assert!(found.contains(&std::thread::current().id()));
    }
    // The same workers go on from call to call, also where there are fewer tasks than threads.
    let first = hosted(Some(team), 3, || threads_at_work(3));
    hosted(Some(team), 3, || map(2, WORTH_A_TEAM, Ok)).unwrap();
    assert_eq!(hosted(Some(team), 3, || threads_at_work(3)), first);
}

#[test]
fn small_work_is_done_by_the_caller() {
    let me = |_| Ok(std::thread::current().id());
    for team in [team(), None] {
        let ids = hosted(team, 3, || map(100, WORTH_A_TEAM - 1, me)).unwrap();
        assert_eq!(ids, [std::thread::current().id(); 100]);
    }
    let ids = hosted(None, 1, || map(100, WORTH_A_THREAD, me)).unwrap();
    assert_eq!(ids, [std::thread::current().id(); 100]);
}

#[test]
fn a_panic_on_any_thread_of_a_team_reaches_the_caller() {
    let Some(team) = team() else { return };
    let caller = std::thread::current().id();
    for on_caller in [true, false] {
        let (started, start) = (AtomicUsize::new(0), Instant::now());
        let result = catch_unwind(AssertUnwindSafe(|| {
            hosted(Some(team), 2, || {
                map(2, WORTH_A_TEAM, |_| -> Result<(), Error> {
                    started.fetch_add(1, Ordering::Relaxed);
                    while started.load(Ordering::Relaxed) < 2 && start.elapsed() < LONG {
                        std::thread::yield_now(); // so that each thread gets one task
                    }
                    if (std::thread::current().id() == caller) == on_caller {
                        resume_unwind(Box::new("on purpose")); // a panic that prints nothing
                    }
                    Ok(())
                })
            })
        }));
        assert_eq!(result.unwrap_err().downcast_ref(), Some(&"on purpose"));
        assert!(!is_hosted(), "the choice of the caller is restored");
        assert_eq!(hosted(Some(team), 2, || threads_at_work(2)).len(), 2, "the team goes on");
    }
}

#[test]
fn errors_of_tasks_on_a_team_are_those_of_the_caller() {
    let Some(team) = team() else { return };
    let f = |i| if i == 3 { Err(Error::NoChannels) } else { Ok(i) };
    assert_eq!(hosted(Some(team), 2, || map(5, WORTH_A_TEAM, f)), Err(Error::NoChannels));
}

#[test]
fn calls_inside_a_parallel_region_and_from_several_threads() {
    let Some(team) = team() else { return };
    let wanted: Vec<_> = (0..50).collect();
    let call = || assert_eq!(hosted(Some(team), 3, || map(50, WORTH_A_TEAM, Ok)).as_ref(), Ok(&wanted));
    team.run(2, &call);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..100).for_each(|_| call()));
        }
        (0..100).for_each(|_| call());
    });
}

#[test]
fn a_host_is_that_of_one_thread_and_one_call() {
    assert!(!is_hosted());
    hosted(None, 2, || {
        assert!(is_hosted());
        hosted(None, 3, || assert!(is_hosted()));
        assert!(is_hosted());
        std::thread::scope(|scope| scope.spawn(|| assert!(!is_hosted())).join()).unwrap();
    });
    assert!(!is_hosted());
}

#[test]
fn libraries_without_a_team_are_errors() {
    assert_eq!(ThreadSource::find("own", None).unwrap().name(), "own");
    assert!(matches!(ThreadSource::find("OpenMP", None), Err(Error::ThreadSource { .. })));
    assert!(matches!(ThreadSource::find("own", Some(Path::new("libm.so.6"))), Err(Error::ThreadSource { .. })));
    if cfg!(target_os = "linux") {
        for library in ["libm.so.6", "no such library", "nul\0"] {
            let found = ThreadSource::find("openmp", Some(Path::new(library)));
            assert!(matches!(found, Err(Error::Library { got, .. }) if got == library), "{library}");
        }
    }
}
