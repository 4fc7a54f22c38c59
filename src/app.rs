//! Puts the parts together, and takes them apart in order. The only file that names them all.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::auth::issuers::Issuer;
use crate::auth::sessions::Sessions;
use crate::auth::{Authenticator, Keys, Rights};
use crate::config::{Config, ConfigError, LogChoice};
use crate::delivery::hub::Hub;
use crate::delivery::registry::Registry;
use crate::delivery::{Delivery, Sources};
use crate::dispatch::Dispatcher;
use crate::edge::contract;
use crate::edge::export::{Exports, Limits};
use crate::edge::health::Health;
use crate::edge::http::Api;
use crate::edge::http::documents::LazyDocuments;
use crate::edge::http::probes::Probes;
use crate::edge::listener;
use crate::edge::origin::Origins;
use crate::edge::routes::{self, Door, Edge};
use crate::edge::sse::Streams;
use crate::edge::ws::Sockets;
use crate::ingest::admit::Admission;
use crate::ingest::limits::RateLimits;
use crate::ingest::pending::Pending;
use crate::ingest::submit::Submit;
use crate::ingest::tickets::Tickets;
use crate::log::embedded::EmbeddedLog;
use crate::log::embedded::read_only::ReadOnlyLog;
use crate::log::kafka::{KafkaConfig, KafkaLog, Known};
use crate::log::{Identity, IfUnnamed, Log, LogError, Reader};
use crate::memory::{Budget, Plan};
use crate::outbound::{Outbound, Service};
use crate::partitioning::NEW_LOG_PARTITIONS;
use crate::projector::level::Level;
use crate::projector::opening::{self, OpenError};
use crate::projector::{Projector, Pump, Status};
use crate::reaper::Reaper;
use crate::search::Search;
use crate::store::{Origin, Progress, Store, StoreError, StoreMemory};
use crate::webhook::Webhook;
use crate::{panics, telemetry};

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
    #[error(transparent)]
    Open(#[from] OpenError),
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
    /// The operator's own address, if there is one.
    pub admin: Option<SocketAddr>,
    store: Arc<Store>,
    registry: Arc<Registry>,
    health: Arc<Health>,
    log: Arc<dyn Log>,
    stop_accepting: watch::Sender<bool>,
    accepting: JoinHandle<()>,
    stop_admin: watch::Sender<bool>,
    administering: Option<JoinHandle<()>>,
    delivering: JoinHandle<()>,
    chores: Vec<JoinHandle<()>>,
    dispatcher: Arc<Dispatcher>,
    dispatching: [std::thread::JoinHandle<()>; 2],
    webhook: Option<(Arc<Webhook>, JoinHandle<()>)>,
    searching: Searching,
    projecting: std::thread::JoinHandle<()>,
    stop_projecting: Arc<AtomicBool>,
}

/// Opens the configured log.
pub fn open_log(config: &Config) -> Result<Arc<dyn Log>, LogError> {
    open_log_with(config, None, IfUnnamed::Refuse)
}

/// The same on a person's word: a log that holds records and does not say which one it is gets a name, as a generation
/// after `epoch` if that is given.
pub fn open_log_by_word(config: &Config, epoch: Option<&str>) -> Result<Arc<dyn Log>, LogError> {
    open_log_with(config, None, IfUnnamed::Name(epoch))
}

/// The same to look at it while no server runs: the embedded log is not changed by that, and nothing is made where there is no
/// log. `origin` is what the projections are made of.
pub fn open_log_to_read(config: &Config, origin: Option<Origin>) -> Result<Arc<dyn Log>, LogError> {
    match config.log {
        LogChoice::Embedded => Ok(Arc::new(ReadOnlyLog::open(&config.log_dir())?)),
        LogChoice::Kafka => {
            let kafka = kafka_config(config);
            if KafkaLog::find_partitions(&kafka)?.is_none() {
                let why = format!("there are no topics {}… on {}", kafka.topic_prefix, kafka.brokers);
                return Err(LogError::Unavailable(why));
            }
            open_log_with(config, origin.and_then(known).as_ref(), IfUnnamed::Refuse)
        }
    }
}

/// What a node that has projections knows of its log.
fn known(origin: Origin) -> Option<Known> {
    let offset = *origin.positions.first()?;
    let identity = Identity { starts: origin.starts, ..Identity::of_epoch(&origin.epoch) };
    Some(Known { identity, offset })
}

/// The log on Kafka that is configured; with the number of partitions of a new one, if none is given.
pub fn kafka_config(config: &Config) -> KafkaConfig {
    KafkaConfig {
        brokers: config.brokers.clone(),
        partitions: config.partitions.unwrap_or(NEW_LOG_PARTITIONS),
        topic_prefix: config.topic_prefix.clone(),
        group: format!("{}projector-{}", config.topic_prefix, config.node()),
        settings: config.kafka_config.clone(),
        memory: config.memory().log,
    }
}

fn open_log_with(config: &Config, known: Option<&Known>, if_unnamed: IfUnnamed<'_>) -> Result<Arc<dyn Log>, LogError> {
    Ok(match config.log {
        LogChoice::Embedded => {
            refuse_lost_log(config)?;
            let memory = config.memory().log;
            Arc::new(EmbeddedLog::open_sized(&config.log_dir(), config.partitions, if_unnamed, memory)?)
        }
        LogChoice::Kafka => {
            std::fs::create_dir_all(&config.data)
                .map_err(|error| LogError::Unavailable(format!("{}: {error}", config.data.display())))?;
            let mut kafka = kafka_config(config);
            if config.partitions.is_none()
                && let Some(found) = KafkaLog::find_partitions(&kafka)?
            {
                kafka.partitions = found;
            }
            Arc::new(KafkaLog::open_with(kafka, known, if_unnamed)?)
        }
    })
}

/// Projections without the log that they were made from are the last copy of it: no empty log is made beside them.
fn refuse_lost_log(config: &Config) -> Result<(), LogError> {
    let (log, projections) = (config.log_dir(), config.projections_dir());
    if projections.join("CURRENT").exists() && EmbeddedLog::is_missing(&log) {
        return Err(LogError::Missing { log, projections });
    }
    Ok(())
}

/// What a server stands on.
struct OpenedParts {
    log: Arc<dyn Log>,
    store: Arc<Store>,
    progress: Vec<Progress>,
    /// Goes on where the store has come to.
    reader: Box<dyn Reader>,
}

/// Opens the log and its projections.
fn open(config: &Config) -> Result<OpenedParts, StartError> {
    let path = config.projections_dir();
    let Plan { cache, memtables, keys: key_filter, .. } = config.memory();
    let memory = StoreMemory { cache, memtables, key_filter };
    let (log, store) = match config.log {
        // Whoever starts a second server on one --data is told so by the log.
        LogChoice::Embedded => (open_log(config)?, Store::open_or_set_aside(&path, memory)?),
        LogChoice::Kafka => {
            let store = Store::open_or_set_aside(&path, memory)?;
            let known = store.origin()?.and_then(known);
            (open_log_with(config, known.as_ref(), IfUnnamed::Refuse)?, store)
        }
    };
    let (store, progress) = opening::resume(&path, store, log.as_ref())?;
    let positions: Vec<u64> = progress.iter().map(|progress| progress.next).collect();
    let reader = log.reader(&positions)?;
    Ok(OpenedParts { log, store: Arc::new(store), progress, reader })
}

impl App {
    /// Starts everything; returns once the server listens.
    pub async fn start(config: Config) -> Result<App, StartError> {
        let verifier = config.verifier()?;
        let (issuers, sessions, webhook) = (config.issuers()?, config.sessions()?, config.webhook()?);
        let metrics = telemetry::install();
        panics::report();
        let bind = |address| listener::bind(address).map_err(|source| StartError::Listen { address, source });
        let listening = bind(config.listen)?;
        let listening_admin = config.admin_listen.map(bind).transpose()?;

        let opening = config.clone();
        let opened = tokio::task::spawn_blocking(move || open(&opening));
        let OpenedParts { log, store, progress, reader } = opened.await.map_err(|_| StartError::Interrupted)??;

        let pending = Arc::new(Pending::default());
        let registry = Arc::new(Registry::new(config.connection_limits()));
        let limits = Arc::new(RateLimits::new(config.rates()));
        let (hub, publish, delivering) = Hub::start(pending.clone(), registry.clone());

        let status = Arc::new(Status::default());
        let stop_projecting = Arc::new(AtomicBool::new(false));
        let pump = Pump {
            projector: Projector::new(store.clone(), log.as_ref(), progress),
            threads: config.memory().projectors,
            log: log.clone(),
            reader,
            status: status.clone(),
            stop: stop_projecting.clone(),
            publish,
        };
        let projecting = pump.start()?;

        let memory = Arc::new(Budget::new(config.memory()));
        let rights = Rights::new(store.clone());
        let level = Arc::new(Level::new(log.clone(), status.clone()));
        let submit = Arc::new(Submit::new(log.clone(), pending.clone()));
        let (dispatcher, dispatching) =
            Dispatcher::start(store.clone(), submit.clone(), level.clone(), status.clone(), config.memory().work)?;
        let searching = start_search(&config, &store)?;
        let health = Arc::new(Health::new(log.clone(), status.clone(), config.data.clone()));
        let reaper = Reaper {
            store: store.clone(),
            submit: submit.clone(),
            projector: status.clone(),
            stalled_after: config.run_stalled_after(),
        };

        let outbound = Outbound::new(config.dns_server, config.service_hosts.clone()).map_err(ConfigError::new)?;
        let issuers = issuers.into_iter().map(|issuer| Issuer::new(issuer, outbound.clone()));
        let issuers: Vec<_> = issuers.collect::<Result<_, _>>().map_err(ConfigError::new)?;
        let sessions = sessions.map(|sessions| Sessions::new(sessions, outbound.clone())).transpose();
        let sessions = sessions.map_err(ConfigError::new)?;
        let (sessions, ended_sessions) = sessions.unzip();
        let keys = Keys { own: verifier, issuers: issuers.clone(), audience: config.jwt_audience.clone() };
        let auth = Arc::new(Authenticator::new(keys, sessions.clone(), store.clone()));
        let webhook = webhook.map(|webhook| Webhook::new(webhook, outbound, store.clone(), dispatcher.clone()));
        let webhook = webhook.transpose().map_err(ConfigError::new)?;
        let admission = Arc::new(Admission::new(rights.clone(), limits.clone(), store.clone()));
        let tickets = Tickets {
            store: store.clone(),
            level: level.clone(),
            submit: submit.clone(),
            admission: admission.clone(),
            auth: auth.clone(),
        };

        let edge = edge(Handles {
            auth,
            webhook: webhook.as_ref().map(|it| it.service().clone()),
            tickets: Arc::new(tickets),
            admission,
            delivery: Arc::new(Delivery::new(Sources {
                store: store.clone(),
                rights: rights.clone(),
                hub: hub.clone(),
                submit: submit.clone(),
                memory: memory.readers.clone(),
            })),
            memory,
            store: store.clone(),
            rights,
            level,
            submit,
            hub,
            dispatcher: dispatcher.clone(),
            search: searching.as_ref().map(|(search, _)| search.clone()),
            registry: registry.clone(),
            health: health.clone(),
            metrics: metrics.clone(),
            epoch: log.epoch(),
            origins: Arc::new(Origins::new(config.allow_origin.clone()).with_cookies(sessions.is_some())),
        });
        let edge = Arc::new(edge);
        let (address, stop_accepting, accepting) = accept(&config, listening, &edge)?;
        let (admin, stop_admin, administering) = accept_admin(listening_admin, edge)?;

        let mut chores = vec![
            chore("the deadlines of publishes", pending.expire()),
            chore("the watch over the lag", health.clone().watch()),
            chore("the upkeep of metrics", telemetry::upkeep(metrics)),
            chore("the upkeep of rates", limits.upkeep()),
            chore("the reaper", reaper.run()),
            chore("the watch over the rules' version", leave_outdated(status, registry.clone())),
        ];

        chores.extend(issuers.into_iter().map(|issuer| chore("the keys of an issuer", issuer.keep_fresh())));
        if let (Some(sessions), Some(ended)) = (sessions, ended_sessions) {
            chores.push(chore("the check of sessions", sessions.keep_checking()));
            chores.push(chore("the end of sessions", end_sessions(ended, registry.clone())));
        }
        let webhook = webhook.map(|it| (it.clone(), chore("the webhook", it.run())));

        Ok(App {
            address,
            admin,
            store,
            registry,
            health,
            log,
            stop_accepting,
            accepting,
            stop_admin,
            administering,
            delivering,
            chores,
            dispatcher,
            dispatching,
            webhook,
            searching,
            projecting,
            stop_projecting,
        })
    }

    /// Waits until the server answers: the projections have what the log had at the start. An error says why they never will,
    /// without an upgrade.
    pub async fn ready(&self) -> Result<(), String> {
        self.health.caught_up().await
    }

    /// Waits until damage is found in the projections. Then this server has to stop; the next one makes them anew.
    pub async fn projections_damaged(&self) -> String {
        let mut every = tokio::time::interval(Duration::from_millis(200));
        loop {
            every.tick().await;
            if let Some(damage) = self.store.damage() {
                return damage;
            }
        }
    }

    /// Stops everything, from the outside in: no new connections, sessions finish what was accepted, then the projector,
    /// the log and the store. Takes at most about 10 s.
    pub async fn stop(self) {
        self.health.set_draining();
        self.stop_accepting.send_replace(true);
        self.registry.drain();
        if let Some((webhook, _)) = &self.webhook {
            webhook.stop();
        }
        if tokio::time::timeout(DRAIN_WITHIN, self.registry.emptied()).await.is_err() {
            tracing::warn!("some sessions did not end in time; their clients will resume");
        }

        // Requests under way have the same verdicts to wait for as sessions had, and nothing longer.
        drop(tokio::time::timeout(Duration::from_secs(1), self.accepting).await);
        if let Some((_, running)) = self.webhook {
            drop(running.await);
        }
        // What the workers that are gone held is given back to the log.
        self.dispatcher.stop();
        drop(tokio::task::spawn_blocking(|| self.dispatching.map(|thread| thread.join())).await);
        self.stop_projecting.store(true, Ordering::Release);

        let (log, store, projecting, searching) = (self.log, self.store, self.projecting, self.searching);
        let closing = tokio::task::spawn_blocking(move || {
            // It ends without an error: a panic of it ends the process.
            drop(projecting.join());
            // It has come as far as the projector, so that the next start has nothing to index.
            if let Some((search, thread)) = searching {
                search.stop();
                drop(thread.join());
            }
            log.close();
            if let Err(error) = store.flush() {
                tracing::warn!(%error, "the projections are not flushed; the next start reads more of the log");
            }
        });

        // The projector dropped its end of the hub's queue, so the hub has delivered all and ends.
        drop(closing.await);
        drop(self.delivering.await);
        for chore in self.chores {
            chore.abort();
        }
        // The last to go: until here it showed how the others went.
        self.stop_admin.send_replace(true);
        if let Some(administering) = self.administering {
            drop(tokio::time::timeout(Duration::from_millis(100), administering).await);
        }
    }
}

type Searching = Option<(Arc<Search>, std::thread::JoinHandle<()>)>;

/// Search, unless it is off.
fn start_search(config: &Config, store: &Arc<Store>) -> Result<Searching, StartError> {
    let Some(language) = config.search_language() else { return Ok(None) };
    Ok(Some(Search::start(store.clone(), config.search_dir(), language, config.memory().search)?))
}

/// Once this node must be upgraded to go on, its clients are asked to go to another one.
async fn leave_outdated(status: Arc<Status>, registry: Arc<Registry>) {
    status.until_outdated().await;
    registry.drain();
}

/// Connections of a user one of whose sessions is over look which of them came in with it.
async fn end_sessions(mut ended: mpsc::Receiver<Arc<str>>, registry: Arc<Registry>) {
    while let Some(user) = ended.recv().await {
        registry.revoke(&user);
    }
    std::future::pending().await
}

/// Everything that some part of the edge works with.
struct Handles {
    store: Arc<Store>,
    rights: Rights,
    level: Arc<Level>,
    auth: Arc<Authenticator>,
    webhook: Option<Arc<Service>>,
    tickets: Arc<Tickets>,
    admission: Arc<Admission>,
    submit: Arc<Submit>,
    hub: Arc<Hub>,
    dispatcher: Arc<Dispatcher>,
    search: Option<Arc<Search>>,
    delivery: Arc<Delivery>,
    registry: Arc<Registry>,
    health: Arc<Health>,
    memory: Arc<Budget>,
    metrics: PrometheusHandle,
    epoch: String,
    origins: Arc<Origins>,
}

/// Gives each part of the edge the handles that it uses.
fn edge(handles: Handles) -> Edge {
    let Handles {
        store,
        rights,
        level,
        auth,
        webhook,
        tickets,
        admission,
        submit,
        hub,
        dispatcher,
        search,
        delivery,
        registry,
        health,
        memory,
        metrics,
        epoch,
        origins,
    } = handles;
    let api = Api {
        store: store.clone(),
        rights: rights.clone(),
        level: level.clone(),
        tickets: tickets.clone(),
        admission: admission.clone(),
        submit: submit.clone(),
        hub: hub.clone(),
        dispatcher: dispatcher.clone(),
        search: search.clone(),
        registry: registry.clone(),
        memory: memory.clone(),
        epoch: epoch.clone(),
    };
    let streams = Streams {
        auth: auth.clone(),
        rights: rights.clone(),
        delivery: delivery.clone(),
        registry: registry.clone(),
        store: store.clone(),
        epoch: epoch.clone(),
        memory: memory.readers.clone(),
    };
    let exports = Exports {
        auth: auth.clone(),
        rights: rights.clone(),
        level: level.clone(),
        store: store.clone(),
        epoch: epoch.clone(),
        memory: memory.readers.clone(),
        limits: Limits::default(),
    };
    let frames = memory.frames.clone();
    let probes = Probes {
        auth: auth.clone(),
        webhook,
        store: store.clone(),
        registry: registry.clone(),
        health: health.clone(),
        memory,
        metrics,
    };
    let sockets = Sockets {
        store,
        hub,
        dispatcher,
        search,
        submit,
        auth: auth.clone(),
        tickets: tickets.clone(),
        rights,
        level: level.clone(),
        admission: admission.clone(),
        delivery,
        registry,
        health: health.clone(),
        epoch,
        origins,
        memory: frames,
    };
    Edge {
        auth,
        tickets,
        health,
        level,
        admission,
        api: Arc::new(api),
        streams: Arc::new(streams),
        exports: Arc::new(exports),
        sockets: Arc::new(sockets),
        probes: Arc::new(probes),
        documents: Arc::new(LazyDocuments::new(contract::documents)),
    }
}

/// The connections that are configured, or as many as there is memory for.
fn max_connections(config: &Config) -> usize {
    let (configured, most) = (config.max_connections, config.memory().max_connections());
    if most < configured {
        tracing::warn!(configured, most, "--memory has room for fewer connections than --max-connections allows");
    }
    configured.min(most)
}

/// A task that lasts as long as the server.
fn chore(part: &'static str, work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(panics::vital(part, work))
}

type Accepting = (SocketAddr, watch::Sender<bool>, JoinHandle<()>);

fn accept(config: &Config, listening: TcpListener, edge: &Arc<Edge>) -> Result<Accepting, StartError> {
    let address = listening.local_addr()?;
    let (stop, stopped) = watch::channel(false);
    let service = |door| routes::service(edge.clone(), door, config.admin_listen.is_some());
    let (all, beyond) = (service(Door::Main), service(Door::BeyondLimit));
    let serving = listener::serve(listening, all, beyond, max_connections(config), stopped);
    let accepting = tokio::spawn(panics::vital("the accept loop", serving));
    Ok((address, stop, accepting))
}

type Administering = (Option<SocketAddr>, watch::Sender<bool>, Option<JoinHandle<()>>);

fn accept_admin(listening: Option<TcpListener>, edge: Arc<Edge>) -> Result<Administering, StartError> {
    let (stop, stopped) = watch::channel(false);
    let Some(listening) = listening else { return Ok((None, stop, None)) };
    let address = listening.local_addr()?;
    let service = routes::service(edge, Door::Admin, true);
    let serving = listener::serve_admin(listening, service, stopped);
    let administering = tokio::spawn(panics::vital("the accept loop of --admin-listen", serving));
    Ok((Some(address), stop, Some(administering)))
}
