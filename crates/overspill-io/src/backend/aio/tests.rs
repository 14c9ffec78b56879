//! The backend against the real kernel, and its submission loop against every kernel there could be.

use proptest::prelude::*;
use rustix::fs::{Mode, OFlags};

use super::*;
use crate::backend::testing::{Bed, CHUNK};
use crate::error::Direction;

const BOUND: Duration = Duration::from_secs(20);

/// Parks until something is back, but not for ever.
fn next(aio: &mut Aio) -> Arrival {
    let deadline = Instant::now() + BOUND;
    let mut arrivals = Vec::new();
    while arrivals.is_empty() {
        aio.park(Some(deadline), &mut arrivals).unwrap();
        assert!(Instant::now() < deadline, "nothing woke the driver up");
    }
    assert_eq!(arrivals.len(), 1);
    arrivals.remove(0)
}

/// A crew without workers: transfers stay where the test can see them, and it answers by the sender.
fn idle_crew(aio: &mut Aio) -> (Receiver<Transfer>, crossbeam_channel::Sender<Arrival>) {
    let (crew, jobs) = Crew::without_workers(aio.depth);
    let (done, answers) = bounded(aio.depth);
    aio.hired = Some(Hired { answers, crew });
    (jobs, done)
}

#[test]
fn a_doorbell_that_cannot_be_polled_breaks_the_context_and_answers_are_kept() {
    let bed = Bed::new(1);
    let mut aio = Aio::start(1, 1).unwrap();
    aio.submit(bed.transfer(Direction::Write, 0));
    // A descriptor that stands for a path only: nothing can be done with the file behind it.
    let deaf = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    aio.doorbell = Arc::new(Doorbell::new(Wire::EventFd(deaf)));
    let mut arrivals = Vec::new();
    assert_eq!(aio.park(Some(Instant::now() + BOUND), &mut arrivals), Err(Errno::BADF));
    assert_eq!(arrivals.len(), 1, "a file in memory is written when its request is taken");
}

#[test]
fn an_idle_context_wakes_up_for_its_deadline_alone() {
    let mut aio = Aio::start(4, 1).unwrap();
    let deadline = Instant::now() + Duration::from_millis(100);
    let mut wake_ups = 0;
    while Instant::now() < deadline {
        aio.park(Some(deadline), &mut Vec::new()).unwrap();
        wake_ups += 1;
    }
    assert_eq!(wake_ups, 1);
}

#[test]
fn a_ring_wakes_the_parked_driver_again_and_again() {
    let mut aio = Aio::start(1, 1).unwrap();
    let doorbell = Arc::clone(aio.doorbell());
    let (parks, parked) = bounded::<()>(0);
    let ringer = std::thread::spawn(move || {
        // Rings when the driver is about to park, or just has: it must wake up either way.
        for () in parked {
            doorbell.ring();
        }
    });
    for _ in 0..100 {
        parks.send(()).unwrap();
        let deadline = Instant::now() + BOUND;
        aio.park(Some(deadline), &mut Vec::new()).unwrap();
        assert!(Instant::now() < deadline, "the ring was not heard");
        assert!(aio.doorbell().answer());
    }
    drop(parks);
    ringer.join().unwrap();
}

#[test]
fn a_buffered_file_holds_up_nobody() {
    let bed = Bed::new(2);
    let mut aio = Aio::start(2, 1).unwrap();
    let (jobs, done) = idle_crew(&mut aio);
    aio.submit(bed.transfer_of(&bed.zeros, Direction::Read, 0));
    let held = jobs.try_recv().unwrap();
    // Its worker is as slow as the test wants; the other file's transfer passes.
    aio.submit(bed.transfer(Direction::Write, 0));
    let passed = next(&mut aio);
    assert_eq!((passed.transfer.file.path(), passed.result), (bed.file.path(), CHUNK as i32));
    assert!(done.send(Arrival { transfer: held, result: 7 }).is_ok());
    aio.doorbell().ring();
    let slow = next(&mut aio);
    assert_eq!((slow.transfer.file.path(), slow.result), (bed.zeros.path(), 7));
}

#[test]
fn an_answer_that_does_not_ring_is_found_before_sleeping() {
    let bed = Bed::new(2);
    let mut aio = Aio::start(2, 1).unwrap();
    // Rung and heard, but not answered: so is the doorbell when a driver has just been woken up.
    aio.doorbell().ring();
    let deadline = Instant::now() + BOUND;
    aio.park(Some(deadline), &mut Vec::new()).unwrap();
    let (jobs, done) = idle_crew(&mut aio);
    aio.submit(bed.transfer_of(&bed.zeros, Direction::Read, 0));
    assert!(done.send(Arrival { transfer: jobs.try_recv().unwrap(), result: 7 }).is_ok());
    aio.doorbell().ring();
    let mut arrivals = Vec::new();
    aio.park(Some(deadline), &mut arrivals).unwrap();
    assert_eq!(arrivals.len(), 1);
    assert!(Instant::now() < deadline, "the driver slept over an answer");
}

#[test]
fn workers_answer_for_files_that_go_through_the_page_cache() {
    let bed = Bed::new(1);
    let mut aio = Aio::start(1, 1).unwrap();
    aio.submit(bed.transfer(Direction::Write, 0));
    drop(next(&mut aio));
    assert!(aio.hired.is_none(), "nobody needed a worker so far");
    for _ in 0..10 {
        aio.submit(bed.transfer_of(&bed.zeros, Direction::Read, 0));
        let arrival = next(&mut aio);
        assert_eq!(arrival.result, CHUNK as i32);
        assert!(arrival.transfer.block.iter().all(|&byte| byte == 0));
        aio.doorbell().answer();
    }
}

#[test]
fn a_refused_request_is_answered_and_those_behind_it_go_on() {
    let bed = Bed::new(3);
    let mut aio = Aio::start(3, 1).unwrap();
    for offset in [0, u64::MAX, CHUNK as u64] {
        aio.submit(bed.transfer(Direction::Write, offset));
    }
    let mut arrivals = Vec::new();
    let deadline = Instant::now() + BOUND;
    aio.park(Some(deadline), &mut arrivals).unwrap();
    assert!(aio.kernel.waiting.is_empty(), "all were sent at once");
    while arrivals.len() < 3 {
        assert!(Instant::now() < deadline, "{} of 3 came back", arrivals.len());
        aio.park(Some(deadline), &mut arrivals).unwrap();
    }
    arrivals.sort_by_key(|arrival| arrival.transfer.offset);
    let results = arrivals.iter().map(|arrival| arrival.result).collect::<Vec<_>>();
    assert_eq!(results, [CHUNK as i32, CHUNK as i32, -libc::EINVAL]);
    assert!(aio.kernel.flying.is_empty());
}

#[test]
fn what_the_kernel_has_no_room_for_goes_later() {
    // The kernel makes more room than it is asked for, by the number of processors.
    let bed = Bed::new(8192);
    let mut aio = Aio::start(1, 1).unwrap();
    let (mut submitted, mut arrivals) = (0, Vec::new());
    while aio.kernel.waiting.is_empty() {
        aio.submit(bed.transfer(Direction::Write, submitted as u64 * CHUNK as u64));
        aio.kernel.send(&mut arrivals).unwrap();
        submitted += 1;
    }
    aio.submit(bed.transfer(Direction::Write, submitted as u64 * CHUNK as u64));
    let deadline = Instant::now() + BOUND;
    while arrivals.len() <= submitted {
        assert!(Instant::now() < deadline, "{} came back", arrivals.len());
        aio.park(Some(deadline), &mut arrivals).unwrap();
    }
    assert!(arrivals.iter().all(|arrival| arrival.result == CHUNK as i32));
    assert_eq!(bed.file.len().unwrap(), (submitted as u64 + 1) * CHUNK as u64);
    assert!(aio.kernel.flying.is_empty() && aio.kernel.waiting.is_empty());
}

#[test]
fn a_request_that_waits_for_room_bounds_the_sleep() {
    let mut aio = Aio::start(1, 1).unwrap();
    let Wire::EventFd(wire) = aio.doorbell.wire() else { panic!("it is an eventfd") };
    aio.kernel.waiting.push_back(Request::poll(WAKE, wire.as_fd()));
    let deadline = Instant::now() + BOUND;
    aio.receive(Some(deadline), &mut Vec::new()).unwrap();
    assert!(Instant::now() < deadline, "nothing was with the kernel, and the driver waited for it");
}

#[test]
fn what_the_kernel_holds_outlives_the_backend() {
    let bed = Bed::new(1);
    let mut aio = Aio::start(1, 1).unwrap();
    // Taken on and never answered: nobody can say whether the kernel is done with it.
    aio.kernel.flying.insert(bed.transfer(Direction::Read, 0));
    drop(aio);
    assert_eq!(bed.pool.leased_blocks(), 1, "the memory is nobody else's");
}

#[test]
fn answers_that_no_transfer_can_have_are_errors() {
    assert_eq!((answer(4096), answer(0), answer(-5)), (4096, 0, -5));
    assert_eq!([i64::MAX, i64::MIN, 1 << 31].map(answer), [-libc::EIO; 3]);
}

/// One answer of a kernel to being given requests.
#[derive(Clone, Copy, Debug)]
enum Reply {
    /// As many as there are, at most so many.
    Takes(usize),
    Refuses(Errno),
    HasNoRoom(Errno),
}

fn replies() -> impl Strategy<Value = Vec<Reply>> {
    let refusals = [Errno::INVAL, Errno::BADF, Errno::PERM, Errno::NOSYS, Errno::FAULT];
    prop::collection::vec(
        prop_oneof![
            4 => (0_usize..6).prop_map(Reply::Takes),
            2 => prop::sample::select(refusals.to_vec()).prop_map(Reply::Refuses),
            1 => prop::sample::select(vec![Errno::AGAIN, Errno::INTR]).prop_map(Reply::HasNoRoom),
        ],
        0..60,
    )
}

proptest! {
    #[test]
    fn every_request_is_taken_or_refused_or_waits_once_whatever_the_kernel_answers(
        requests in 0_usize..40,
        replies in replies(),
    ) {
        let mut waiting: VecDeque<usize> = (0..requests).collect();
        let (mut taken, mut refused) = (Vec::new(), Vec::new());
        let mut replies = replies.into_iter();
        // Every turn is one park of the driver.
        for _turn in 0..3 {
            let mut calls = 0;
            let before = waiting.len();
            hand_over(
                &mut waiting,
                |given| {
                    calls += 1;
                    match replies.next().unwrap_or(Reply::Takes(usize::MAX)) {
                        Reply::Takes(most) => {
                            let takes = most.min(given.len());
                            taken.extend_from_slice(&given[..takes]);
                            Ok(takes)
                        }
                        Reply::Refuses(errno) | Reply::HasNoRoom(errno) => Err(errno),
                    }
                },
                |request, errno| refused.push((request, errno)),
            );
            prop_assert!(calls <= before, "each call but the last settles a request");
        }
        prop_assert!(taken.is_sorted() && refused.is_sorted_by_key(|&(request, _)| request));
        prop_assert!(refused.iter().all(|&(_, errno)| errno != Errno::AGAIN && errno != Errno::INTR));
        let mut all: Vec<usize> = taken;
        all.extend(refused.iter().map(|&(request, _)| request));
        all.extend(waiting);
        all.sort_unstable();
        prop_assert_eq!(all, (0..requests).collect::<Vec<_>>());
    }
}
