//! The stores on the database: functions with their change records, the code list, claims, the execution log.

mod claims;
mod code_list;
mod executions;
mod functions;
mod probe;

pub(super) use claims::SqliteClaims;
pub(super) use code_list::SqliteCodeList;
pub(super) use executions::SqliteExecutions;
pub(super) use functions::{SqliteFunctions, add_counters, put_function};
