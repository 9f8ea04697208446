//! Looks after the node's place on the disk: what was lost, full or read-only comes back, and perhaps nothing
//! else would show it. A disk may be slow, so one look ends before the next begins.

use super::Claim;
use crate::audit::RowDisk;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

const LOOK_EVERY: Duration = Duration::from_secs(2);

pub struct Disk {
    pub claim: Option<Arc<dyn Claim>>,
    pub rows: Option<Arc<RowDisk>>,
}

impl Disk {
    pub async fn run(self) {
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let (claim, rows) = (self.claim.clone(), self.rows.clone());
            let look = move || {
                claim.iter().for_each(|claim| claim.tend());
                // They stand in the directory of the claim.
                rows.iter().for_each(|rows| rows.probe());
            };
            if let Err(e) = tokio::task::spawn_blocking(look).await {
                std::panic::resume_unwind(e.into_panic());
            }
        }
    }
}
