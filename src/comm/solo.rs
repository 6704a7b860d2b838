//! A world of one rank: every collective is done before it begins.

use super::Communicator;
use super::hosts::Hosts;
use crate::device::{Arena, SliceMut};
use crate::error::Result;
use std::ops::Range;
use std::time::Duration;

pub struct Solo;

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn hosts(&self) -> Hosts {
        Hosts::apart(1)
    }
    fn transport(&self) -> &'static str {
        "none"
    }
    fn allocate(&mut self, bytes: usize) -> Result<Arena> {
        Arena::host(bytes)
    }
    fn allocate_replicated(&mut self, bytes: usize) -> Result<Arena> {
        Arena::host(bytes)
    }
    /// Nothing: there is one copy.
    fn received(&self, _len: usize, _each: &mut dyn FnMut(Range<usize>)) {}
    fn all_reduce(&mut self, _: SliceMut<'_>) -> Result<Duration> {
        Ok(Duration::ZERO)
    }
    fn reduce_scatter(&mut self, _: SliceMut<'_>) -> Result<Duration> {
        Ok(Duration::ZERO)
    }
    fn all_gather(&mut self, _: SliceMut<'_>) -> Result<Duration> {
        Ok(Duration::ZERO)
    }
    fn broadcast(&mut self, _: SliceMut<'_>, _: usize) -> Result<Duration> {
        Ok(Duration::ZERO)
    }
    fn barrier(&mut self) -> Result<Duration> {
        Ok(Duration::ZERO)
    }
}
