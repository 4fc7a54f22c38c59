//! Puts the parts together, and takes them apart in order. The only file that names them all.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::auth::{Authenticator, Rights};
use crate::config::{Config, ConfigError, LogChoice};
use crate::delivery::Delivery;
use crate::delivery::hub::Hub;
use crate::delivery::registry::Registry;
use crate::edge::health::Health;
use crate::edge::ws::Sockets;
use crate::edge::{Context, listener, routes};
use crate::ingest::admit::Admission;
use crate::ingest::limits::Limits;
use crate::ingest::pending::Pending;
use crate::ingest::submit::Submit;
use crate::log::embedded::EmbeddedLog;
use crate::log::kafka::{KafkaConfig, KafkaLog};
use crate::log::{Log, LogError, Reader};
use crate::projector::{Projector, Pump, Status};
use crate::reaper::Reaper;
use crate::store::{Progress, Store, StoreError};
use crate::telemetry;

/// How long sessions get to finish what was accepted, on the way down.
const DRAIN_WITHIN: Duration = Duration::from_secs(9);

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
    #[error("the start was interrupted")]
    Interrupted,
}

/// A running server.
pub struct App {
    pub address: SocketAddr,
    ctx: Arc<Context>,
    log: Arc<dyn Log>,
    stop_accepting: watch::Sender<bool>,
    accepting: JoinHandle<()>,
    delivering: JoinHandle<()>,
    chores: Vec<JoinHandle<()>>,
    projecting: std::thread::JoinHandle<()>,
    stop_projecting: Arc<AtomicBool>,
}

/// Opens the configured log.
pub fn open_log(config: &Config) -> Result<Arc<dyn Log>, LogError> {
    Ok(match config.log {
        LogChoice::Embedded => Arc::new(EmbeddedLog::open(&config.log_dir(), config.partitions)?),
        LogChoice::Kafka => {
            std::fs::create_dir_all(&config.data)
                .map_err(|error| LogError::Unavailable(format!("{}: {error}", config.data.display())))?;
            Arc::new(KafkaLog::open(KafkaConfig {
                brokers: config.brokers.clone(),
                partitions: config.partitions,
                topic_prefix: config.topic_prefix.clone(),
                group: group(config),
            })?)
        }
    })
}

/// The consumer group that shows this node's lag: a node is known by its data folder.
fn group(config: &Config) -> String {
    let path = std::path::absolute(&config.data).unwrap_or_else(|_| config.data.clone());
    let digest = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
    format!("{}projector-{}", config.topic_prefix, &digest[..8])
}

/// A store, how far it has come, and what reads on from there.
pub type Opened = (Store, Vec<Progress>, Box<dyn Reader>);

/// A log's projections, as far as they have come, and a reader that goes on from there.
pub fn open_store(config: &Config, log: &dyn Log) -> Result<Opened, StartError> {
    let path = config.projections_dir();
    let (store, progress) = Store::open_for(&path, log.epoch(), log.partitions())?;
    match log.reader(&positions(&progress)) {
        Ok(reader) => Ok((store, progress, reader)),
        Err(error @ LogError::OutOfRange { .. }) => {
            tracing::warn!(%error, "the projections do not fit the log: rebuilding them");
            drop(store);
            Store::destroy(&path)?;
            let (store, mut progress) = Store::open_for(&path, log.epoch(), log.partitions())?;
            for (progress, bounds) in progress.iter_mut().zip(log.bounds()?) {
                progress.next = bounds.start;
            }
            let reader = log.reader(&positions(&progress))?;
            Ok((store, progress, reader))
        }
        Err(error) => Err(error.into()),
    }
}

fn positions(progress: &[Progress]) -> Vec<u64> {
    progress.iter().map(|progress| progress.next).collect()
}

impl App {
    /// Starts everything; returns once the server listens.
    pub async fn start(config: Config) -> Result<App, StartError> {
        let verifier = config.verifier()?;
        let metrics = telemetry::install();
        let address = config.listen;
        let listening = listener::bind(address).map_err(|source| StartError::Listen { address, source })?;
        let opening = config.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let log = open_log(&opening)?;
            let (store, progress, reader) = open_store(&opening, log.as_ref())?;
            Ok::<_, StartError>((log, Arc::new(store), progress, reader))
        });
        let (log, store, progress, reader) = opened.await.map_err(|_| StartError::Interrupted)??;

        let pending = Arc::new(Pending::default());
        let registry = Arc::new(Registry::new(config.max_user_connections));
        let limits = Arc::new(Limits::new(config.rates()));
        let (hub, commits, delivering) = Hub::start(pending.clone(), registry.clone());
        let status = Arc::new(Status::default());
        let stop_projecting = Arc::new(AtomicBool::new(false));
        let pump = Pump {
            projector: Projector::new(store.clone(), log.as_ref(), progress),
            log: log.clone(),
            reader,
            status: status.clone(),
            stop: stop_projecting.clone(),
            // Hands what became visible to the hub; waits while the hub is behind.
            publish: Box::new(move |commit| commits.blocking_send(commit).is_ok()),
        };
        let projecting = std::thread::Builder::new().name("projector".into()).spawn(move || pump.run())?;

        let rights = Rights::new(store.clone());
        let submit = Arc::new(Submit::new(log.clone(), pending.clone()));
        let health = Arc::new(Health::new(log.clone(), status.clone()));
        let reaper = Reaper {
            store: store.clone(),
            submit: submit.clone(),
            projector: status,
            stalled_after: config.run_stalled_after(),
        };
        let auth = Arc::new(Authenticator::new(verifier, store.clone()));
        let admission = Arc::new(Admission::new(rights.clone(), limits.clone()));
        let delivery = Arc::new(Delivery::new(store.clone(), rights.clone(), hub.clone(), submit.clone()));
        let sockets = Arc::new(Sockets {
            store: store.clone(),
            hub: hub.clone(),
            submit: submit.clone(),
            auth: auth.clone(),
            rights: rights.clone(),
            admission: admission.clone(),
            delivery: delivery.clone(),
            registry: registry.clone(),
            health: health.clone(),
            epoch: log.epoch().to_owned(),
            origins: config.allow_origin.clone(),
        });
        let ctx = Arc::new(Context {
            auth,
            admission,
            delivery,
            rights,
            store,
            hub,
            submit,
            epoch: log.epoch().to_owned(),
            registry,
            sockets,
            health: health.clone(),
            metrics: metrics.clone(),
        });
        let (address, stop_accepting, accepting) = accept(&config, listening, ctx.clone())?;
        let chores = vec![
            tokio::spawn(pending.expire()),
            tokio::spawn(health.watch()),
            tokio::spawn(telemetry::upkeep(metrics)),
            tokio::spawn(limits.upkeep()),
            tokio::spawn(reaper.run()),
        ];
        Ok(App { address, ctx, log, stop_accepting, accepting, delivering, chores, projecting, stop_projecting })
    }

    /// Waits until the server answers: the projections have what the log had at the start.
    pub async fn ready(&self) {
        self.ctx.health.caught_up().await;
    }

    /// Stops everything, from the outside in: no new connections, sessions finish what was accepted, then the projector,
    /// the log and the store. Takes at most about 10 s.
    pub async fn stop(self) {
        self.ctx.health.set_draining();
        self.stop_accepting.send_replace(true);
        self.ctx.registry.drain();
        if tokio::time::timeout(DRAIN_WITHIN, self.ctx.registry.emptied()).await.is_err() {
            tracing::warn!("some sessions did not end in time; their clients will resume");
        }
        // Requests under way have the same verdicts to wait for as sessions had, and nothing longer.
        drop(tokio::time::timeout(Duration::from_secs(1), self.accepting).await);
        self.stop_projecting.store(true, Ordering::Release);
        let (log, ctx, projecting) = (self.log, self.ctx, self.projecting);
        let closing = tokio::task::spawn_blocking(move || {
            if projecting.join().is_err() {
                tracing::error!("the projector had panicked");
            }
            log.close();
            if let Err(error) = ctx.store.flush() {
                tracing::warn!(%error, "the projections are not flushed; the next start reads more of the log");
            }
        });
        // The projector dropped its end of the hub's queue, so the hub has delivered all and ends.
        drop(closing.await);
        drop(self.delivering.await);
        for chore in self.chores {
            chore.abort();
        }
    }
}

fn accept(
    config: &Config,
    listening: TcpListener,
    ctx: Arc<Context>,
) -> Result<(SocketAddr, watch::Sender<bool>, JoinHandle<()>), StartError> {
    let address = listening.local_addr()?;
    let (stop, stopped) = watch::channel(false);
    let accepting = tokio::spawn(listener::serve(listening, routes::routes(ctx), config.max_connections, stopped));
    Ok((address, stop, accepting))
}
