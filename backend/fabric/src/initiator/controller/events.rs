//! What a controller reports by itself: events, and the log pages that say more.

use super::{Association, End, Task};
use crate::initiator::geometry::{Identity, Known};
use crate::initiator::signal::Seldom;
use crate::nvme::bytes::low32;
use crate::nvme::identify::{IdentifyNamespace, cns};
use crate::nvme::log::{AsyncEvent, id};
use crate::nvme::reservation::{NoticeLog, ReservationNotice};
use crate::nvme::{Sgl, Sqe};
use std::time::Duration;

/// How often events that we do nothing about are logged at most.
const EVENT_LOG_EVERY: Duration = Duration::from_secs(60);

impl Task {
    pub(super) async fn follow_events(&self, association: &Association) -> End {
        let admin = &association.admin;
        let mut log = Seldom::new(EVENT_LOG_EVERY);
        loop {
            let event = match admin.event().await {
                Err(why) => return End::Trouble(why),
                // No such requests here: nothing to follow.
                Ok(None) => return std::future::pending().await,
                Ok(Some(event)) => event,
            };
            if event == AsyncEvent::ANA_CHANGE && association.has_ana {
                // Reads the log page.
                self.shared.chores[self.path].post_once(());
                continue;
            }
            if event.log_page == id::RESERVATION_NOTIFICATION {
                self.reservation_notice(association, &mut log).await;
                continue;
            }
            // Reading the log page lets the next event of this kind come.
            let (len, nsid) =
                if event == AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED { (4096, 0) } else { (512, u32::MAX) };
            let sqe = Sqe::get_log_page(event.log_page, nsid, 0, len, false, Sgl::NONE);
            if let Err(why) = admin.command("read a log page", sqe, len).await {
                log::debug!("{}: {why}", self.label());
            }
            if event != AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED {
                if log.may(self.runtime.now()) {
                    log::info!(
                        "{}: the controller reports {event:?}, of which nothing follows here",
                        self.label()
                    );
                }
                continue;
            }
            if let Err(end) = self.namespace_changed(association).await {
                return end;
            }
        }
    }

    /// Another host has done something to our registration: whoever relies on it learns it from a conflict; people from this.
    async fn reservation_notice(&self, association: &Association, log: &mut Seldom) {
        let len = low32(NoticeLog::LEN as u64);
        let sqe = Sqe::get_log_page(id::RESERVATION_NOTIFICATION, 0, 0, len, false, Sgl::NONE);
        let data = match association.admin.command("read the log of reservation notices", sqe, len).await {
            Ok((_, data)) => data,
            Err(why) => return log::debug!("{}: {why}", self.label()),
        };
        let Ok(data) = <[u8; NoticeLog::LEN]>::try_from(data) else { return };
        // Not about other namespaces of the subsystem.
        let notice = NoticeLog::from_bytes(&data).notice.filter(|(_, nsid)| *nsid == association.nsid);
        if let Some((notice, _)) = notice.filter(|_| log.may(self.runtime.now())) {
            let what = match notice {
                ReservationNotice::RegistrationPreempted => "has preempted our registration",
                ReservationNotice::Released => "has released a reservation, or changed its type",
                ReservationNotice::Preempted => "has cleared all registrations",
            };
            log::warn!("{}: another host {what}: requests may end in a reservation conflict", self.label());
        }
    }

    pub(super) async fn namespace_changed(&self, association: &Association) -> Result<(), End> {
        let what = "identify the namespace";
        let data = association.admin.identify(what, cns::NAMESPACE, association.nsid).await?;
        let before = &association.identity;
        let identity = Identity {
            capabilities: before.capabilities,
            controller: before.controller.clone(),
            nvm: before.nvm,
            namespace: IdentifyNamespace::from_bytes(&data),
            ids: before.ids,
        };
        let found = Known::of(&identity).map_err(End::Refused)?;
        let (known, here) = {
            let status = self.shared.status();
            (status.known, status.paths[self.path].blocks)
        };
        let Some(known) = known else { return Ok(()) };
        let now = self.shared.adopt(self.path, &found, true).map_err(End::Refused)?;
        if now.geometry.blocks < found.geometry.blocks && here != Some(found.geometry.blocks) {
            let (size, here) = (now.geometry.size_bytes(), found.geometry.size_bytes());
            log::info!(
                "{}: the namespace has {here} bytes on this path, and {size} on others: it is that large for its disks until all say so",
                self.label()
            );
        }
        if now != known {
            let (old, new) = (known.geometry.size_bytes(), now.geometry.size_bytes());
            log::info!(
                "{}: its target says that it has {new} bytes now, and had {old}: its disks are told",
                self.shared.config.name
            );
        }
        Ok(())
    }
}
