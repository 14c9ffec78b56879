//! Who may work on a file at a time.
//!
//! A write whose ends are not aligned reads the sectors around it, changes its own bytes and writes them back, and it
//! sets the file's length. Whatever else moved in that file meanwhile could be undone by it. So such a write has its
//! file to itself: it begins when everything that came before it is over, and what comes later waits for it. All
//! other operations share a file freely.
//!
//! The gate is plain data: operations come in by [`Gate::arrive`] and go by [`Gate::leave`], each exactly once.

use std::collections::{HashMap, VecDeque};

use crate::file::FileId;

/// How an operation uses its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Beside others.
    Shared,
    /// Alone.
    Exclusive,
}

/// The operations at work on each file, and those that wait for them, each with a payload of its owner's.
pub(crate) struct Gate<T> {
    files: HashMap<FileId, Yard<T>>,
}

/// One file's operations. There is none without an operation inside.
struct Yard<T> {
    inside: usize,
    access: Access,
    waiting: VecDeque<(Access, T)>,
}

impl<T> Gate<T> {
    pub(crate) fn new() -> Gate<T> {
        Gate { files: HashMap::new() }
    }

    /// Lets the operation in, which gives its payload back, or keeps it waiting.
    pub(crate) fn arrive(&mut self, file: FileId, access: Access, payload: T) -> Option<T> {
        let Some(yard) = self.files.get_mut(&file) else {
            self.files.insert(file, Yard { inside: 1, access, waiting: VecDeque::new() });
            return Some(payload);
        };
        // Nobody overtakes: an exclusive operation that waits is not to wait for ever.
        if yard.waiting.is_empty() && (yard.access, access) == (Access::Shared, Access::Shared) {
            yard.inside += 1;
            return Some(payload);
        }
        yard.waiting.push_back((access, payload));
        None
    }

    /// Takes note that an operation on the file is over, and lets in those that it kept out.
    pub(crate) fn leave(&mut self, file: FileId) -> Vec<T> {
        let yard = self.files.get_mut(&file).expect("who leaves has been let in");
        yard.inside -= 1;
        let mut admitted = Vec::new();
        while let Some(&(access, _)) = yard.waiting.front() {
            let fits = yard.inside == 0 || (yard.access, access) == (Access::Shared, Access::Shared);
            let Some((_, payload)) = yard.waiting.pop_front_if(|_| fits) else { break };
            yard.inside += 1;
            yard.access = access;
            admitted.push(payload);
        }
        if yard.inside == 0 {
            self.files.remove(&file);
        }
        admitted
    }

    /// Gives up everybody who waits.
    pub(crate) fn abandon(self) -> impl Iterator<Item = T> {
        self.files.into_values().flat_map(|yard| yard.waiting).map(|(_, payload)| payload)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: FileId = FileId::test(1);

    #[test]
    fn an_exclusive_operation_is_alone_and_nobody_overtakes_it() {
        let mut gate = Gate::new();
        assert_eq!(gate.arrive(FILE, Access::Shared, 'a'), Some('a'));
        assert_eq!(gate.arrive(FILE, Access::Shared, 'b'), Some('b'));
        assert_eq!(gate.arrive(FILE, Access::Exclusive, 'C'), None);
        assert_eq!(gate.arrive(FILE, Access::Shared, 'd'), None);
        assert_eq!(gate.arrive(FILE, Access::Shared, 'e'), None);
        assert_eq!(gate.arrive(FileId::test(2), Access::Exclusive, 'X'), Some('X'), "another file");
        assert_eq!(gate.leave(FILE), []);
        assert_eq!(gate.leave(FILE), ['C']);
        assert_eq!(gate.arrive(FILE, Access::Exclusive, 'F'), None);
        assert_eq!(gate.leave(FILE), ['d', 'e']);
        assert_eq!(gate.leave(FILE), []);
        assert_eq!(gate.leave(FILE), ['F']);
        assert_eq!(gate.leave(FILE), []);
        assert_eq!(gate.abandon().count(), 0);
    }

    #[test]
    fn who_waits_is_given_up_with_the_gate() {
        let mut gate = Gate::new();
        assert!(gate.arrive(FILE, Access::Exclusive, 1).is_some());
        assert!(gate.arrive(FILE, Access::Shared, 2).is_none());
        assert_eq!(gate.abandon().collect::<Vec<_>>(), [2]);
    }

    proptest! {
        #[test]
        fn everybody_gets_in_once_in_order_and_exclusive_ones_alone(
            steps in prop::collection::vec((0_u64..3, any::<bool>(), any::<bool>()), 1..200),
        ) {
            let mut gate = Gate::new();
            let mut inside: HashMap<u64, Vec<(usize, Access)>> = HashMap::new();
            let mut admitted: HashMap<u64, Vec<usize>> = HashMap::new();
            let mut arrived: HashMap<u64, Vec<usize>> = HashMap::new();
            let mut check = |file: u64, payload: (usize, Access), inside: &mut HashMap<u64, Vec<_>>| {
                let here = inside.entry(file).or_default();
                here.push(payload);
                let alone = here.iter().all(|&(_, access)| access == Access::Shared) || here.len() == 1;
                admitted.entry(file).or_default().push(payload.0);
                alone
            };
            let total = steps.len();
            for (number, (file, exclusive, leave)) in steps.into_iter().enumerate() {
                let access = if exclusive { Access::Exclusive } else { Access::Shared };
                arrived.entry(file).or_default().push(number);
                if let Some(payload) = gate.arrive(FileId::test(file), access, (number, access)) {
                    prop_assert!(check(file, payload, &mut inside));
                }
                if leave && let Some(_gone) = inside.get_mut(&file).and_then(Vec::pop) {
                    for payload in gate.leave(FileId::test(file)) {
                        prop_assert!(check(file, payload, &mut inside));
                    }
                }
            }
            for file in 0..3 {
                while inside.get_mut(&file).and_then(Vec::pop).is_some() {
                    for payload in gate.leave(FileId::test(file)) {
                        prop_assert!(check(file, payload, &mut inside));
                    }
                }
            }
            prop_assert_eq!(&admitted, &arrived);
            prop_assert_eq!(admitted.values().map(Vec::len).sum::<usize>(), total);
        }
    }
}
