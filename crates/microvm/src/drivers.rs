//! Several drivers as one: the first makes new microVMs, each loads what its like has saved and takes over what it started. A host whose
//! VMM was changed keeps its sandboxes so.

use std::sync::Arc;

use async_trait::async_trait;

use crate::{Driver, Error, Isolation, Launch, Microvm, ProcessRecord, Stamp, Start, fake, firecracker, qemu};

pub struct Drivers {
    all: Vec<Arc<dyn Driver>>,
}

impl Drivers {
    pub fn new(first: Arc<dyn Driver>, others: Vec<Arc<dyn Driver>>) -> Self {
        let mut all = vec![first];
        all.extend(others);
        Self { all }
    }

    fn first(&self) -> &dyn Driver {
        self.all[0].as_ref()
    }

    fn named(&self, name: &str) -> Option<&dyn Driver> {
        self.all.iter().map(AsRef::as_ref).find(|driver| driver.name() == name)
    }
}

#[async_trait]
impl Driver for Drivers {
    fn name(&self) -> &'static str {
        self.first().name()
    }

    fn version(&self) -> &str {
        self.first().version()
    }

    fn isolation(&self) -> Isolation {
        self.first().isolation()
    }

    fn stamp(&self) -> Stamp {
        self.first().stamp()
    }

    fn stamp_of(&self, record: &ProcessRecord) -> Stamp {
        self.named(&record.driver).unwrap_or_else(|| self.first()).stamp_of(record)
    }

    fn boots_into_its_file(&self) -> bool {
        self.first().boots_into_its_file()
    }

    fn loads(&self, saved: &Stamp) -> Result<(), String> {
        self.named(&saved.driver).unwrap_or_else(|| self.first()).loads(saved)
    }

    async fn start(&self, launch: Launch, start: Start) -> Result<Arc<dyn Microvm>, Error> {
        let driver = match &start {
            Start::Load { made_by: Some(stamp), .. } => self.named(&stamp.driver),
            Start::Load { made_by: None, .. } | Start::Boot { .. } => None,
        };
        driver.unwrap_or_else(|| self.first()).start(launch, start).await
    }

    async fn adopt(&self, record: &ProcessRecord) -> Result<Arc<dyn Microvm>, Error> {
        match self.named(&record.driver) {
            Some(driver) => driver.adopt(record).await,
            None => adopt(record),
        }
    }
}

/// Takes over what some driver started, also one whose VMM is not installed any more: what runs needs nothing of that.
pub fn adopt(record: &ProcessRecord) -> Result<Arc<dyn Microvm>, Error> {
    match record.driver.as_str() {
        qemu::NAME => qemu::adopt(record),
        firecracker::NAME => firecracker::adopt(record),
        fake::NAME => fake::adopt(record),
        other => {
            let cause = std::io::Error::new(std::io::ErrorKind::Unsupported, format!("no driver is named {other:?}"));
            Err(Error::io("take over a microVM")(cause))
        }
    }
}
