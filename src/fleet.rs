//! This node among the others: leases, and the jobs of nodes that are gone.

mod adoption;

