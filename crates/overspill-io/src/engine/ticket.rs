//! The answer to one operation, owed by the driver and owned by the caller.
//!
//! A [`Reply`] and its [`Ticket`] share one cell. A ticket brings the block back, or, for a write behind the caller's
//! back, only the news: then the block went home the moment the last byte was written, so that the pool can pace a
//! caller who has not looked yet. It is filled exactly once: by [`Reply::send`], or, should
//! the driver panic over the operations it has taken, by dropping the reply. An operation that the driver never took
//! is not dropped with it, for a channel keeps its messages while anybody can send: the driver leaves a guard behind
//! that answers those. The caller takes the answer by [`Ticket::wait`], or
//! drops the ticket; then the answer, and with it the block, is dropped wherever it arrives. The ticket never holds
//! the block before the operation is over.

use std::fmt;
use std::sync::Arc;

use super::cell::Cell;
use super::parts::Part;
use super::stats::Stats;
use crate::error::{Failed, IoError};
use crate::memory::block::Block;

/// What comes of an operation.
type Answer<T> = Result<T, Failed>;

/// A claim on an operation's answer and on its block.
///
/// Dropping it abandons the answer: the operation still completes, and then its block returns to the pool.
#[must_use = "the block and the outcome come back through the ticket"]
pub struct Ticket<T = Block> {
    cell: Arc<Cell<Answer<T>>>,
    stats: Arc<Stats>,
}

impl<T> Ticket<T> {
    /// Waits until the operation is over.
    ///
    /// # Errors
    ///
    /// [`Failed`], with the block, if not every byte was moved.
    pub fn wait(self) -> Result<T, Failed> {
        let (answer, waited) = self.cell.take();
        self.stats.waited(waited);
        answer
    }

    /// Whether [`Ticket::wait`] would return at once.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.cell.is_filled()
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        self.cell.close();
    }
}

impl<T> fmt::Debug for Ticket<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("is_done", &self.is_done()).finish_non_exhaustive()
    }
}

/// The driver's end of a ticket.
pub(crate) enum Reply {
    /// The caller wants the block back.
    Block(Promise<Block>),
    /// The caller wants to know; the block goes home if all went well.
    Done(Promise<()>),
    /// The caller waits for several operations as for one.
    Part(Part),
    /// The caller does not wait, but is called.
    Call(Callback),
}

impl Reply {
    /// Answers; the answer is dropped if the ticket was.
    pub(crate) fn send(self, answer: Answer<Block>) {
        match self {
            Reply::Block(promise) => promise.keep(answer),
            // The block is home before the waiter wakes.
            Reply::Done(promise) => promise.keep(answer.map(drop)),
            Reply::Part(part) => part.send(answer),
            Reply::Call(callback) => callback.call(answer),
        }
    }
}

/// What is called with an answer.
type Call = Box<dyn FnOnce(Answer<Block>) + Send>;

/// The obligation to call somebody once.
pub(crate) struct Callback(Option<Call>);

impl Callback {
    pub(crate) fn new(call: Call) -> Callback {
        Callback(Some(call))
    }

    fn call(mut self, answer: Answer<Block>) {
        if let Some(call) = self.0.take() {
            call(answer);
        }
    }
}

impl Drop for Callback {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call(Err(Failed { error: IoError::EngineStopped, block: None }));
        }
    }
}

/// The obligation to answer one ticket.
pub(crate) struct Promise<T> {
    cell: Arc<Cell<Answer<T>>>,
}

impl<T> Promise<T> {
    /// Makes the two ends.
    pub(crate) fn new(stats: Arc<Stats>) -> (Promise<T>, Ticket<T>) {
        let cell = Arc::new(Cell::new());
        (Promise { cell: Arc::clone(&cell) }, Ticket { cell, stats })
    }

    fn keep(self, answer: Answer<T>) {
        self.cell.fill(answer);
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        // After an answer this finds the cell filled and changes nothing.
        self.cell.fill(Err(Failed { error: IoError::EngineStopped, block: None }));
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::{BlockClass, Pool};

    fn pool() -> Pool {
        Pool::new(&[BlockClass { name: "test", block_bytes: 4096, count: 1 }]).unwrap()
    }

    fn pair() -> (Reply, Ticket) {
        let (promise, ticket) = Promise::new(Arc::new(Stats::default()));
        (Reply::Block(promise), ticket)
    }

    #[test]
    fn a_write_behind_sends_its_block_home_before_anybody_asks() {
        let pool = pool();
        let (promise, ticket) = Promise::new(Arc::new(Stats::default()));
        Reply::Done(promise).send(Ok(pool.lease(10).unwrap()));
        assert_eq!(pool.leased_blocks(), 0);
        ticket.wait().unwrap();
    }

    #[test]
    fn a_failed_write_behind_brings_its_block_back() {
        let pool = pool();
        let (promise, ticket) = Promise::<()>::new(Arc::new(Stats::default()));
        let block = Some(pool.lease(10).unwrap());
        Reply::Done(promise).send(Err(Failed { error: IoError::EngineStopped, block }));
        assert_eq!(ticket.wait().unwrap_err().block.map(|block| block.len()), Some(10));
    }

    #[test]
    fn an_answer_wakes_the_waiter() {
        let pool = pool();
        let (reply, ticket) = pair();
        assert!(!ticket.is_done());
        let block = thread::scope(|scope| {
            let waiter = scope.spawn(|| ticket.wait());
            reply.send(Ok(pool.lease(10).unwrap()));
            waiter.join().unwrap().unwrap()
        });
        assert_eq!(block.len(), 10);
    }

    #[test]
    fn an_answer_to_a_dropped_ticket_sends_the_block_home() {
        let pool = pool();
        let (reply, ticket) = pair();
        drop(ticket);
        reply.send(Ok(pool.lease(10).unwrap()));
        assert_eq!(pool.leased_blocks(), 0);
    }

    #[test]
    fn a_ticket_dropped_after_its_answer_sends_the_block_home() {
        let pool = pool();
        let (reply, ticket) = pair();
        reply.send(Ok(pool.lease(10).unwrap()));
        assert!(ticket.is_done());
        drop(ticket);
        assert_eq!(pool.leased_blocks(), 0);
    }

    #[test]
    fn a_call_is_made_once_also_by_a_reply_that_is_never_sent() {
        let pool = pool();
        let (sender, answers) = std::sync::mpsc::channel();
        for sent in [true, false] {
            let sender = sender.clone();
            let call = Box::new(move |answer: Answer<Block>| sender.send(answer.is_ok()).unwrap());
            let reply = Reply::Call(Callback::new(call));
            if sent {
                reply.send(Ok(pool.lease(10).unwrap()));
            }
        }
        drop(sender);
        assert_eq!(answers.iter().collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn a_reply_that_is_never_sent_still_answers() {
        let (reply, ticket) = pair();
        drop(reply);
        let failed = ticket.wait().unwrap_err();
        assert_eq!(failed.error, IoError::EngineStopped);
        assert!(failed.block.is_none());
    }
}
