//! The membership of this node in the fleet: its lease, and the adoption of dead nodes.

mod adoption;

pub use adoption::Adopter;
