//! This node among the others: its lease, and the jobs of nodes that are gone.

mod adoption;

pub use adoption::Adopter;
