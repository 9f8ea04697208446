//! Where calls of one service go.

use http::Uri;

/// The address of a service and the scope of its signatures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonRoute {
    pub uri: Uri,
    pub region: String,
    pub service: String,
}
