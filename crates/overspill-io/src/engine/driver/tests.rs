//! The driver on a backend whose answers the test gives, and on ones that break.

use std::thread::{self, JoinHandle};

use crossbeam_channel::{Sender, bounded};

use super::*;
use crate::backend::doorbell::Doorbell;
use crate::backend::threads::{Event, Threads};
use crate::engine::op::Request;
use crate::engine::queue::{Limits, Priority};
use crate::engine::ticket::{Promise, Reply, Ticket};
use crate::error::{Direction, Failed};
use crate::file::File;
use crate::{BackendKind, BlockClass, Pool};

const CHUNK: usize = 4096;
const DEPTH: usize = 4;
const BOUND: Duration = Duration::from_secs(20);
const AT_ONCE: Duration = Duration::ZERO;

fn limits(depth: usize) -> Limits {
    Limits { depth, bytes: usize::MAX, detours: 1 }
}

/// A driver whose kernel is the test: it sees every transfer, and answers when and how it likes.
struct Bench {
    pool: Pool,
    file: File,
    stats: Arc<Stats>,
    doorbell: Arc<Doorbell>,
    requests: Option<Sender<Op>>,
    kernel: Receiver<Transfer>,
    answers: Sender<Event>,
    driver: JoinHandle<Result<(), IoError>>,
}

impl Bench {
    fn new(drain_patience: Duration) -> Bench {
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 8 * CHUNK, count: 2 }]).unwrap();
        let (backend, kernel, answers) = Threads::without_workers(DEPTH);
        let doorbell = Arc::clone(backend.doorbell());
        let file = File::in_memory(&doorbell).unwrap();
        let (requests, intake) = bounded(8);
        let stats = Arc::new(Stats::default());
        let driver = {
            let (stats, queue) = (Arc::clone(&stats), Queue::new(CHUNK, limits(DEPTH)));
            thread::spawn(move || Driver::new(Box::new(backend), intake, queue, stats, drain_patience).run())
        };
        Bench { pool, file, stats, doorbell, requests: Some(requests), kernel, answers, driver }
    }

    fn send(&self, direction: Direction, bytes: usize) -> Ticket {
        let block = self.pool.lease(bytes).unwrap();
        let request = Request { direction, file: &self.file, offset: 0, block, priority: Priority::Urgent };
        let (promise, ticket) = Promise::new(Arc::clone(&self.stats));
        let Some(op) = Op::new(request, Reply::Block(promise)) else { panic!("the request is sound") };
        assert!(self.requests.as_ref().unwrap().send(op).is_ok());
        self.doorbell.ring();
        ticket
    }

    fn next(&self) -> Transfer {
        self.kernel.recv_timeout(BOUND).unwrap()
    }

    fn answer(&self, transfer: Transfer, result: i32) {
        assert!(self.answers.send(Event::Arrived(Arrival { transfer, result })).is_ok());
    }

    fn done(&self, transfer: Transfer) {
        let wanted = i32::try_from(transfer.chunk.wanted()).unwrap();
        self.answer(transfer, wanted);
    }

    /// Closes the intake and waits for the driver's end.
    fn close(mut self) -> (Pool, Arc<Stats>, Result<(), IoError>) {
        self.requests = None;
        self.doorbell.ring();
        (self.pool, self.stats, self.driver.join().unwrap())
    }
}

#[test]
fn a_dropped_ticket_keeps_the_block_until_the_completion() {
    let bench = Bench::new(BOUND);
    drop(bench.send(Direction::Read, CHUNK));
    let transfer = bench.next();
    assert_eq!(bench.pool.leased_blocks(), 1);
    bench.done(transfer);
    let (pool, _, ended) = bench.close();
    assert_eq!(ended, Ok(()));
    assert_eq!(pool.leased_blocks(), 0);
}

/// Writes 100 bytes to `file`, which needs 512 at a time. When the first of them come in, `meanwhile` happens, and
/// they are answered with as many sevens as it says.
fn odd_write(file: impl FnOnce(&Arc<Doorbell>) -> File, meanwhile: impl FnOnce(&File) -> i32) -> File {
    let mut bench = Bench::new(BOUND);
    bench.file = file(&bench.doorbell);
    let ticket = bench.send(Direction::Write, 100);
    let mut fetched = bench.next();
    assert_eq!((fetched.direction, fetched.block.len()), (Direction::Read, 512));
    fetched.block.fill(7);
    let length = meanwhile(&bench.file);
    bench.answer(fetched, length);
    let stored = loop {
        let transfer = bench.next();
        if transfer.direction == Direction::Write {
            break transfer;
        }
        bench.answer(transfer, 0);
    };
    let kept = usize::try_from(length).unwrap().max(100);
    assert!(stored.block[100..kept].iter().all(|&byte| byte == 7));
    assert!(stored.block[kept..].iter().all(|&byte| byte == 0));
    if bench.file.len().unwrap() < 512 && !bench.file.is_disk() {
        bench.file.truncate(512).unwrap();
    }
    bench.done(stored);
    ticket.wait().unwrap();
    let file = bench.file.clone();
    assert_eq!(bench.close().2, Ok(()));
    file
}

#[test]
fn an_odd_write_to_a_disk_keeps_what_is_around_it() {
    // The file behind it is empty, as the status of a disk says of every disk.
    let disk = odd_write(|doorbell| File::disk_in_memory(512, doorbell).unwrap(), |_| 512);
    assert_eq!(disk.len().unwrap(), 0, "nobody cuts a disk");
}

#[test]
fn a_file_that_others_cut_or_extend_before_an_odd_write_sees_it_ends_where_it_should() {
    for (before, meanwhile, after) in [(512, 50, 100), (512, 200, 200), (50, 300, 300), (50, 512, 512)] {
        let file = |doorbell: &Arc<Doorbell>| {
            let file = File::in_memory_as("file", 512, doorbell).unwrap();
            file.truncate(before).unwrap();
            file
        };
        let file = odd_write(file, |file| {
            file.truncate(meanwhile).unwrap();
            i32::try_from(meanwhile).unwrap()
        });
        assert_eq!(file.len().unwrap(), after, "{before}, then {meanwhile}");
    }
}

#[test]
fn a_failed_operation_answers_only_when_its_last_chunk_is_home() {
    let bench = Bench::new(BOUND);
    let ticket = bench.send(Direction::Write, 3 * CHUNK);
    let other = bench.send(Direction::Write, CHUNK);
    let [first, second, third, fourth] = std::array::from_fn(|_| bench.next());
    bench.answer(first, -libc::EIO);
    // The other operation's answer shows that the driver has seen the failure.
    let is_other = |transfer: &Transfer| transfer.block.len() == CHUNK && transfer.chunk.start == 0;
    let mut rest = [second, third, fourth].into_iter().collect::<Vec<_>>();
    let at = rest.iter().position(is_other).unwrap();
    bench.done(rest.swap_remove(at));
    other.wait().unwrap();
    assert!(!ticket.is_done(), "two chunks are still with the kernel");
    for transfer in rest {
        bench.done(transfer);
    }
    let Failed { error, block } = ticket.wait().unwrap_err();
    assert!(
        matches!(error, IoError::Transfer { errno: libc::EIO, done, .. } if done == 2 * CHUNK),
        "{error}"
    );
    assert_eq!(block.unwrap().len(), 3 * CHUNK);
    assert_eq!(bench.close().2, Ok(()));
}

#[test]
fn interrupted_and_short_transfers_go_on_and_lose_no_byte() {
    let bench = Bench::new(BOUND);
    let ticket = bench.send(Direction::Read, CHUNK);
    let transfer = bench.next();
    bench.answer(transfer, -libc::EINTR);
    let mut transfer = bench.next();
    assert_eq!((transfer.position(), transfer.chunk.wanted()), (0, CHUNK));
    transfer.block[..1000].fill(1);
    bench.answer(transfer, 1000);
    let mut transfer = bench.next();
    assert_eq!((transfer.position(), transfer.chunk.wanted()), (1000, CHUNK - 1000));
    transfer.block[1000..].fill(2);
    bench.done(transfer);
    let block = ticket.wait().unwrap();
    assert!(block[..1000].iter().all(|&byte| byte == 1) && block[1000..].iter().all(|&byte| byte == 2));
    assert_eq!(bench.stats.totals().bytes_read, CHUNK as u64);
    assert_eq!(bench.close().2, Ok(()));
}

#[test]
fn the_first_failure_is_the_one_reported() {
    let bench = Bench::new(BOUND);
    let ticket = bench.send(Direction::Write, 2 * CHUNK);
    let [first, second] = std::array::from_fn(|_| bench.next());
    bench.answer(second, -libc::ENOSPC);
    bench.answer(first, -libc::EIO);
    assert_eq!(ticket.wait().unwrap_err().error.errno(), Some(libc::ENOSPC));
    assert_eq!(bench.close().2, Ok(()));
}

#[test]
fn a_write_that_moves_nothing_is_an_error() {
    let bench = Bench::new(BOUND);
    let ticket = bench.send(Direction::Write, CHUNK);
    bench.answer(bench.next(), 0);
    assert!(matches!(ticket.wait().unwrap_err().error, IoError::WriteZero { done: 0, .. }));
    assert_eq!(bench.close().2, Ok(()));
}

#[test]
fn accepted_operations_end_before_the_driver_does() {
    let mut bench = Bench::new(Duration::MAX);
    let ticket = bench.send(Direction::Write, 8 * CHUNK);
    bench.requests = None;
    bench.doorbell.ring();
    for _ in 0..8 {
        bench.done(bench.next());
    }
    assert_eq!(ticket.wait().unwrap().len(), 8 * CHUNK);
    assert_eq!(bench.close().2, Ok(()));
}

#[test]
fn what_the_kernel_holds_after_the_drain_patience_is_given_up_and_counted() {
    let bench = Bench::new(AT_ONCE);
    let ticket = bench.send(Direction::Read, 2 * CHUNK);
    let held: [Transfer; 2] = std::array::from_fn(|_| bench.next());
    let (pool, stats, ended) = bench.close();
    assert_eq!(ended, Err(IoError::DrainTimeout { patience: AT_ONCE, leaked_blocks: 1 }));
    let failed = ticket.wait().unwrap_err();
    assert_eq!(failed.error, IoError::EngineStopped);
    assert!(failed.block.is_none());
    assert_eq!(stats.totals().leaked_blocks, 1);
    assert_eq!(pool.leased_blocks(), 1, "the memory that the kernel holds is nobody else's");
    drop(held);
}

/// What the callers' side needs to send operations of one chunk to a driver.
struct Callers {
    pool: Pool,
    file: File,
    stats: Arc<Stats>,
    requests: Sender<Op>,
}

impl Callers {
    fn new(doorbell: &Arc<Doorbell>) -> (Callers, Receiver<Op>) {
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: CHUNK, count: 2 }]).unwrap();
        let (requests, intake) = bounded(2);
        let file = File::in_memory(doorbell).unwrap();
        (Callers { pool, file, stats: Arc::new(Stats::default()), requests }, intake)
    }

    fn send(&self) -> Ticket {
        let block = self.pool.lease(CHUNK).unwrap();
        let (direction, priority) = (Direction::Write, Priority::Urgent);
        let request = Request { direction, file: &self.file, offset: 0, block, priority };
        let (promise, ticket) = Promise::new(Arc::clone(&self.stats));
        let Some(op) = Op::new(request, Reply::Block(promise)) else { panic!("the request is sound") };
        assert!(self.requests.send(op).is_ok());
        ticket
    }
}

/// The answer, if it comes while somebody can still wait for it.
fn answer(ticket: Ticket) -> Failed {
    let deadline = Instant::now() + BOUND;
    while !ticket.is_done() {
        assert!(Instant::now() < deadline, "nobody answers");
        thread::park_timeout(Duration::from_micros(200));
    }
    ticket.wait().unwrap_err()
}

#[test]
fn nothing_is_issued_after_the_drain_patience() {
    let (backend, kernel, _answers) = Threads::without_workers(DEPTH);
    let (callers, intake) = Callers::new(backend.doorbell());
    let ticket = callers.send();
    let Callers { pool, stats, requests, .. } = callers;
    drop(requests);
    let queue = Queue::new(CHUNK, limits(DEPTH));
    let ended = Driver::new(Box::new(backend), intake, queue, Arc::clone(&stats), AT_ONCE).run();
    assert_eq!(ended, Err(IoError::DrainTimeout { patience: AT_ONCE, leaked_blocks: 0 }));
    assert!(kernel.try_recv().is_err(), "the kernel was given a chunk");
    assert_eq!(answer(ticket).block.unwrap().len(), CHUNK);
    assert_eq!((stats.totals().leaked_blocks, pool.leased_blocks()), (0, 0));
}

/// A way to the kernel that ends when it is waited on.
struct Broken {
    doorbell: Arc<Doorbell>,
    out: Vec<Transfer>,
    end: End,
}

impl Backend for Broken {
    fn kind(&self) -> BackendKind {
        BackendKind::Uring
    }

    fn doorbell(&self) -> &Arc<Doorbell> {
        &self.doorbell
    }

    fn submit(&mut self, transfer: Transfer) {
        self.out.push(transfer);
    }

    fn park(&mut self, _: Option<Instant>, arrivals: &mut Vec<Arrival>) -> Result<(), Errno> {
        (self.end)(&mut self.out, arrivals)
    }

    fn tidy(&mut self) {}
}

/// What a wait does, given what is out and a place for what comes back.
type End = fn(&mut Vec<Transfer>, &mut Vec<Arrival>) -> Result<(), Errno>;

/// A driver of a backend that comes to `end` with the first operation, whose ticket is returned too.
fn ending(end: End) -> (Callers, Ticket, JoinHandle<Result<(), IoError>>) {
    let doorbell = Arc::clone(Threads::without_workers(1).0.doorbell());
    let (callers, intake) = Callers::new(&doorbell);
    let ticket = callers.send();
    let (stats, queue) = (Arc::clone(&callers.stats), Queue::new(CHUNK, limits(1)));
    let backend = Box::new(Broken { doorbell, out: Vec::new(), end });
    let driver = thread::spawn(move || Driver::new(backend, intake, queue, stats, BOUND).run());
    (callers, ticket, driver)
}

#[test]
fn a_broken_backend_refuses_with_the_block_until_it_is_shut_down() {
    let (callers, lost, driver) = ending(|_, _| Err(Errno::BADF));
    let failed = answer(lost);
    assert_eq!(failed.error, IoError::EngineStopped);
    assert!(failed.block.is_none());
    let failed = answer(callers.send());
    assert_eq!(failed.error, IoError::EngineStopped);
    assert_eq!(failed.block.unwrap().len(), CHUNK);
    drop(callers.requests);
    let ended = driver.join().unwrap().unwrap_err();
    assert!(matches!(ended, IoError::Backend { errno: libc::EBADF, .. }), "{ended}");
    assert_eq!(callers.stats.totals().leaked_blocks, 1);
}

#[test]
fn what_came_back_before_the_backend_broke_is_answered() {
    let (callers, ticket, driver) = ending(|out, arrivals| {
        arrivals.extend(out.drain(..).map(|transfer| Arrival { transfer, result: CHUNK as i32 }));
        Err(Errno::BADF)
    });
    drop(callers.requests);
    assert!(driver.join().unwrap().is_err());
    assert_eq!(ticket.wait().unwrap().len(), CHUNK);
    assert_eq!(callers.stats.totals().leaked_blocks, 0);
}

#[test]
fn a_driver_that_panics_answers_what_was_sent_and_what_still_comes() {
    let (callers, lost, driver) = ending(|_, _| panic!("a law of the engine is broken"));
    assert!(answer(lost).block.is_none());
    for ticket in [callers.send(), callers.send()] {
        let Failed { error, block } = answer(ticket);
        assert_eq!(error, IoError::EngineStopped);
        assert_eq!(block.unwrap().len(), CHUNK);
    }
    drop(callers.requests);
    assert!(driver.join().is_err());
    assert_eq!(callers.pool.leased_blocks(), 0);
}
