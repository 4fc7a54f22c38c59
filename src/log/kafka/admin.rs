//! Kafka's admin requests, which a thread of their own client answers.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::error::KafkaError;

use super::client::{ASK, Callbacks, Connection};

/// Made for a few questions and then dropped: one that lives on would gather librdkafka's messages, which nobody reads.
pub(super) fn admin_client(connection: &Connection) -> Result<AdminClient<Callbacks>, KafkaError> {
    connection.client().create_with_context(connection.callbacks())
}

pub(super) fn admin_options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(ASK)).operation_timeout(Some(ASK))
}

/// rdkafka's admin calls are futures that its own thread completes; they need no runtime.
pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        thread::park();
    }
}
