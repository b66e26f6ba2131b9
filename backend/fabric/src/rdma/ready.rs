//! A descriptor of the driver's that straight-line code awaits, in the reactor's one io_uring.
#![forbid(unsafe_code)]

use hawser_runtime::{Event, Fd, Runtime, Source, SourceId};
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Tells each time that a descriptor becomes readable. The descriptor may be closed once this was dropped.
pub(crate) struct Readiness {
    runtime: Runtime,
    id: SourceId,
    inner: Rc<RefCell<Inner>>,
}

struct Inner {
    fd: Fd,
    id: Option<SourceId>,
    fired: bool,
    dropped: bool,
    waker: Option<Waker>,
}

impl Source for Inner {
    fn poll(&mut self, runtime: &Runtime, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            let (Event::Op { completed, .. }, Some(id)) = (event, self.id) else { continue };
            self.fired = true;
            if completed.more {
                continue;
            }
            match self.dropped {
                true => runtime.remove_source(id),
                false => runtime.poll_readable(id, 0, self.fd),
            }
        }
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Readiness {
    pub(crate) fn new(runtime: &Runtime, fd: i32) -> Readiness {
        let inner = Inner { fd: Fd(fd), id: None, fired: false, dropped: false, waker: None };
        let inner = Rc::new(RefCell::new(inner));
        let id = runtime.add_source(Rc::clone(&inner) as Rc<RefCell<dyn Source>>);
        inner.borrow_mut().id = Some(id);
        runtime.poll_readable(id, 0, Fd(fd));
        Readiness { runtime: runtime.clone(), id, inner }
    }

    /// Awaits that it has become readable since this was awaited last.
    pub(crate) async fn fired(&self) {
        poll_fn(|cx| {
            let mut inner = self.inner.borrow_mut();
            if std::mem::take(&mut inner.fired) {
                return Poll::Ready(());
            }
            inner.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        self.inner.borrow_mut().dropped = true;
        self.runtime.cancel(self.id, 0);
    }
}
