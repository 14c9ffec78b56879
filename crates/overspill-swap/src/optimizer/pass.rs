//! A pass: tile after tile through the [pipeline], and each wanted part of it through a computation.

use std::ops::Range;

use tracing::debug_span;

use super::gradient::Gradients;
use super::{OptimizerError, OptimizerSwapper, PassError};
use crate::pipeline::{self, Done, Item, Limits};
use crate::slot::Slot;

/// A part of a parameter in a pass.
#[derive(Debug)]
pub struct PartView<'a> {
    /// Index of the parameter.
    pub parameter: usize,
    /// Its elements.
    pub elements: Range<usize>,
    /// Their state.
    pub state: &'a mut [u8],
    /// Whether the state has no contents yet; it is all zeros then.
    pub is_new: bool,
    /// Their gradients, if those were swapped out in this step.
    pub gradient: Option<&'a [u8]>,
}

/// What a pass does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Uses gradients up, and changes the state.
    Step,
    /// Changes the state.
    Edit,
    /// Looks at it.
    Read,
}

impl OptimizerSwapper {
    /// Shows `compute` every part of the parameters that `wants` names, with its gradient; what it does to the state is
    /// stored. Then all gradients are used up, those of other parameters too.
    ///
    /// # Errors
    /// [`PassError::Compute`] with its own refusal, or [`PassError::Swapper`]; the state is lost then, but for the committed
    /// one. When it is the write of a gradient that failed, nothing was changed, and the step can be taken again.
    pub fn step<E>(
        &mut self,
        wants: impl Fn(usize) -> bool,
        compute: impl FnMut(PartView<'_>) -> Result<(), E>,
    ) -> Result<(), PassError<E>> {
        self.pass(Way::Step, wants, compute)
    }

    /// As [`OptimizerSwapper::step`], without gradients: to set the state, or to write it back after it was changed.
    ///
    /// # Errors
    /// As [`OptimizerSwapper::step`].
    pub fn edit<E>(
        &mut self,
        wants: impl Fn(usize) -> bool,
        compute: impl FnMut(PartView<'_>) -> Result<(), E>,
    ) -> Result<(), PassError<E>> {
        self.pass(Way::Edit, wants, compute)
    }

    /// Shows `look` the state as it is; parts that have none are left out.
    ///
    /// # Errors
    /// As [`OptimizerSwapper::step`], but nothing is lost when it is `look` that refuses.
    pub fn read<E>(
        &mut self,
        wants: impl Fn(usize) -> bool,
        mut look: impl FnMut(usize, Range<usize>, &[u8]) -> Result<(), E>,
    ) -> Result<(), PassError<E>> {
        self.pass(Way::Read, wants, |part| look(part.parameter, part.elements, part.state))
    }

    fn pass<E>(
        &mut self,
        way: Way,
        wants: impl Fn(usize) -> bool,
        mut compute: impl FnMut(PartView<'_>) -> Result<(), E>,
    ) -> Result<(), PassError<E>> {
        if self.slots.iter().any(Option::is_none) {
            return Err(OptimizerError::Lost.into());
        }
        if way == Way::Step && self.plan.gradient_bytes.is_some() {
            self.flush_gradients()?;
        }
        let has_contents = |index: usize, part: usize| !self.new.contains(&(index, part));
        let is_wanted = |index: usize| {
            let mut parts = self.plan.tiles[index].parts.iter().enumerate();
            parts.any(|(i, part)| wants(part.parameter) && (way != Way::Read || has_contents(index, i)))
        };
        let wanted: Vec<usize> = (0..self.slots.len()).filter(|&index| is_wanted(index)).collect();
        let _span = debug_span!("pass", ?way, tiles = wanted.len()).entered();

        // Blocks that were filled for a pass over other tiles are wanted now.
        for slot in self.slots.iter_mut().enumerate().filter_map(|(i, slot)| (!is_wanted(i)).then_some(slot))
        {
            if let Some(Slot::Loading(_)) = slot {
                *slot = slot.take().map(Slot::settle).transpose()?;
            }
        }

        let mut in_memory = Vec::with_capacity(wanted.len());
        let mut items = Vec::with_capacity(wanted.len());
        for &index in &wanted {
            let slot = self.slots[index].take().expect("no slot is lost, as was just seen");
            let gradients = if way == Way::Step { self.gradients[index].take() } else { Gradients::Nothing };
            let (memory, stored) = match gradients {
                Gradients::Nothing => (None, Vec::new()),
                Gradients::Memory(bytes) => (Some(bytes), Vec::new()),
                Gradients::Storage(slot) => (None, vec![slot]),
            };
            in_memory.push(memory);
            items.push(match way {
                Way::Read => Item { edited: Vec::new(), read: vec![slot] },
                Way::Step | Way::Edit => Item { edited: vec![slot], read: stored },
            });
        }

        let block_bytes = [self.plan.longest_tile(), self.gradient_block_bytes];
        let limits = Limits { pool: &self.pool, depth: self.plan.depth, block_bytes: &block_bytes };
        let element_bytes = self.plan.gradient_bytes.unwrap_or(0);
        let (plan, new, has_gradient) = (&self.plan, &mut self.new, &self.has_gradient);
        let (mut scratch, mut zeros) = (Vec::new(), Vec::new());
        let mut refusal = None;
        let Done { items, timings } = pipeline::run(limits, items, |at, edited, read| {
            let index = wanted[at];
            let gradients = in_memory[at].as_deref().or(read.first().copied());
            let state = match edited {
                [state] => &mut **state,
                _ => {
                    scratch.clear();
                    scratch.extend_from_slice(read[0]);
                    &mut scratch[..]
                }
            };
            for (i, part) in plan.tiles[index].parts.iter().enumerate().filter(|(_, p)| wants(p.parameter)) {
                let is_new = new.contains(&(index, i));
                if way == Way::Read && is_new {
                    continue;
                }
                if refusal.is_some() {
                    break;
                }
                let Range { start, end } = part.gradient;
                let (start, end) = (start * element_bytes, end * element_bytes);
                let gradient = match gradients {
                    _ if way != Way::Step || !has_gradient[part.parameter] => None,
                    Some(bytes) => Some(&bytes[start..end]),
                    None => {
                        zeros.resize(zeros.len().max(end - start), 0);
                        Some(&zeros[..end - start])
                    }
                };
                let state = &mut state[part.state.clone()];
                if is_new {
                    state.fill(0);
                }
                let elements = part.elements.clone();
                match compute(PartView { parameter: part.parameter, elements, state, is_new, gradient }) {
                    Ok(()) => drop(new.remove(&(index, i))),
                    // What was only looked at is put back to where it was.
                    Err(error) if way == Way::Read => refusal = Some(error),
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })?;

        for (index, item) in wanted.into_iter().zip(items) {
            let Item { edited, read } = item;
            let mut slots = edited.into_iter().chain(read);
            self.slots[index] = slots.next();
            if let Some(room) = slots.next() {
                self.gradients[index].give_back(room);
            }
        }
        self.phases.swap_in += timings.load;
        self.phases.compute += timings.compute;
        self.phases.swap_out += timings.store;
        self.phases.wait += timings.wait;
        self.phases.passes += 1;
        if way == Way::Step {
            self.clear_gradients();
        }
        refusal.map_or(Ok(()), |error| Err(PassError::Compute(error)))
    }
}
