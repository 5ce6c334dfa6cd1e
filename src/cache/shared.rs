//! DRAM hits for lookup-only stores of the host. (Signatures only: lands next.)
#![allow(missing_docs)]
use crate::{block::*, error::Result};
pub struct SharedTable;
impl SharedTable {
    pub fn create(_n: &Namespace, _p: u32, _c: u32) -> Result<Self> {
        Ok(Self)
    }
    pub fn close(&mut self) {}
    pub fn insert(&mut self, _k: &PartKey) {}
    pub fn remove(&mut self, _k: &PartKey) {}
}
pub struct SharedReaders;
impl SharedReaders {
    pub fn new(_n: &Namespace) -> Self {
        Self
    }
    pub fn contains(&self, _k: &PartKey) -> bool {
        false
    }
}
