//! Periodic check of the node's directory on the disk.
//!
//! It restores a directory that is missing, and probes a spill that could not take rows. Without the probe,
//! nothing shows that the disk has recovered until the next row is written. A disk may be slow, so a check
//! ends before the next one starts.

use super::plan::StateClaim;
use crate::ambient::blocking;
use crate::audit::SpillDirs;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

const LOOK_EVERY: Duration = Duration::from_secs(2);

pub struct StateDirMonitor {
    pub claim: Option<Arc<dyn StateClaim>>,
    pub rows: Option<Arc<SpillDirs>>,
}

impl StateDirMonitor {
    pub async fn run(self) {
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let (claim, rows) = (self.claim.clone(), self.rows.clone());
            let look = move || {
                claim.iter().for_each(|claim| claim.tend());
                // After the claim, because the spill is in its directory.
                rows.iter().for_each(|rows| rows.probe());
            };
            blocking(look).await;
        }
    }
}
