//! Every wire contract of Wrenn and nothing else.
//!
//! `v1`: the public REST and WebSocket API. `host`: control plane <-> host agent (Connect over mutual TLS). `guest`: host agent <->
//! envd (Connect and plain HTTP). Types here are serialised; the nouns in `model` are not, and whoever uses both converts by hand.

#[cfg(feature = "guest")]
pub mod guest;
#[cfg(feature = "host")]
pub mod host;
#[cfg(feature = "v1")]
pub mod v1;
