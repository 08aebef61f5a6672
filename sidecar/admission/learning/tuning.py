"""All constants of the learner, with their meaning."""

from __future__ import annotations

# -- start -----------------------------------------------------------------------------------------------

#: While nothing is known, this many requests are sent unpaced, because all cameras send their first frame at once.
START_CREDIT = 16.0
#: Refusals arrive quickly, so silence means that nothing was refused: after each of these seconds, the allowed number
#: of requests without an answer doubles
START_CREDIT_STEP_SECONDS = 0.1
#: ... up to this maximum.
START_MAX_UNANSWERED = 64.0
#: Above that number: requests per second, and their exponential growth per second while the pace delays requests.
START_PACE, START_GROWTH = 16.0, 0.4
#: The pace is at least this multiple of the rate at which requests end.
START_HEADROOM = 1.25
#: Seconds over which the accepted rate is measured.
START_WINDOW_SECONDS = 1.5

# -- first -----------------------------------------------------------------------------------------------

#: Minimum first guess of a limit in requests per second, if the first refusal comes at once.
FIRST_FLOOR = 2.0
#: A small bucket may fill quickly. If only one request was accepted before the first refusal, the search begins at this
#: many requests per second; if n were accepted, at 1/n of it.
FIRST_QUICK = 32.0
#: Assumed size of an unknown bucket, in seconds of its limit.
FIRST_USUAL_BURST_SECONDS = 1.5
#: A first refusal within this many seconds shows a burst; a later one shows a rate,
FIRST_SECONDS = 5.0
#: ... of which this share is assumed to last.
FIRST_LASTING = 0.8
#: Exponential growth of the guess while no refusal contradicts it: per second, if refusals arrive at once; how much
#: less for each second that a refusal takes; and the maximum from one request to the next.
FIRST_SEARCH, FIRST_SEARCH_CAUTION, FIRST_SEARCH_PER_REQUEST = 2.0, 5.0, 0.35

# -- estimate --------------------------------------------------------------------------------------------

#: Minimum and maximum relative error of a limit.
ESTIMATE_SUREST, ESTIMATE_UNSUREST = 0.01, 0.3
#: A limit with a larger relative error than this is vague, that is, not known well.
ESTIMATE_VAGUE = 0.05
#: Minimum of a limit in usual requests per second: one in an hour.
ESTIMATE_LEAST = 1 / 3600
#: The estimated burst is not raised above this many seconds of the limit.
ESTIMATE_MAX_BURST_SECONDS = 6.0
#: Minimum relative error of a limit that was learned before a restart.
ESTIMATE_RECALLED = 0.1
#: One measurement lowers a limit at most to this share of its old value.
ESTIMATE_LARGEST_CUT = 0.3
#: If a measured limit differs from the old limit by more than this share, the provider's limit has changed.
ESTIMATE_MOVED = 0.2

# -- policer ---------------------------------------------------------------------------------------------

#: Maximum number of remembered attempts. With more, the estimate would be more exact than the limit is constant.
POLICER_MAX_REMEMBERED = 1000

# -- ramp ------------------------------------------------------------------------------------------------

#: Length of a ramp as a share of the calls that pay for one refusal: normally, and if the bucket holds fewer than two
#: usual requests (no credit).
RAMP, RAMP_NO_CREDIT = 1.0, 1.4
#: At its end, a ramp exceeds the limit by a share between these two, to use up the burst that the bucket saved. Between
#: them, the share is so large that one extra request is sent in the time that a refusal takes.
RAMP_MIN_EXCESS, RAMP_MAX_EXCESS = 0.05, 0.1
#: If no refusal came, the limit has risen: when this multiple of the burst was sent above the limit; without credit, at
#: this multiple of the ramp's length.
RAMP_SPENT, RAMP_RISEN_NO_CREDIT = 1.2, 1.15
#: Exponential growth per second of a limit that has risen, if refusals arrive at once,
RAMP_RISE = 0.35
#: ... and the maximum growth from one request to the next, which counts at low rates.
RAMP_RISE_PER_REQUEST = 0.08
#: Minimum and maximum length in seconds of the ramp of a well-known limit, because a limit may change. Without credit,
#: the maximum is twice as long.
RAMP_MIN_SECONDS, RAMP_MAX_SECONDS = 4.0, 160.0
#: If each refusal begins a blackout: the share of the quota that probes may cost, and the maximum length in seconds.
RAMP_LOST_SHARE, RAMP_MAX_LOSING_SECONDS = 0.02, 600.0
#: Maximum of the refusals per ramp that are counted. More refusals per ramp make the next ramps longer.
RAMP_MAX_EACH = 4.0
#: A limit that has just changed may change again. RAMP_HASTE: factor for the length of the next ramp; RAMP_FIRST_HASTE:
#: the same at the start. RAMP_HASTE_LEFT: each confirmed limit multiplies the factor by this, up to 1.
RAMP_HASTE, RAMP_FIRST_HASTE, RAMP_HASTE_LEFT = 0.25, 0.35, 1.5

# -- fit -------------------------------------------------------------------------------------------------

#: Number of refusals that one burst must explain, and maximum number of calls between two of them.
FIT_REFUSALS, FIT_MAX_CALLS = 4, 60
#: Bounds that miss one another by at most this share count as meeting, because clocks and delays vary.
FIT_MEET = 0.01
#: A burst of more than this many usual requests is not small.
FIT_SMALL = 4.0
#: The bursts that are tried, as multiples of the present burst, the nearest first.
FIT_TRIED = (1.25, 0.8, 1.6, 0.6, 2.0, 0.5, 2.5, 0.4, 3.2, 4.0, 6.0)

# -- early -----------------------------------------------------------------------------------------------

#: Factors for the limit at the first and second early refusal of an episode. At the third, the limit is measured.
EARLY_CUTS = (0.985, 0.94)
#: Relative error of that measured limit.
EARLY_MEASURED = 0.15

# -- shared ----------------------------------------------------------------------------------------------

#: This many unexplained refusals show that others use the account. If a lower limit has explained them, SHARED_KEPT of
#: them still count: if more come, other users are more probable than a limit that falls again.
SHARED_ODD, SHARED_KEPT = 5, 2
#: Share of the limit that a refusal takes off: at first the maximum, so that shares become equal. Each later cut is
#: SHARED_SETTLE times the one before, down to the minimum, so that shares stay equal.
SHARED_MAX_CUT, SHARED_MIN_CUT, SHARED_SETTLE = 0.25, 0.1, 0.85
#: A refusal within this many seconds after the last event shows a new user: the cut is the maximum again.
SHARED_CROWD_SECONDS = 5.0
#: Refusals per second whose cuts are made up for by growth, at a limit of SHARED_USUAL requests per second. It is
#: proportional to 1 / sqrt(limit), up to a limit of SHARED_LARGE: so growth in requests differs less than shares do.
SHARED_REFUSALS, SHARED_USUAL, SHARED_LARGE = 0.03, 5.0, 20.0
#: Maximum growth from one request to the next.
SHARED_MAX_GROWTH = 0.02
#: If this many refusals were expected since the last event and none came, a user has left.
SHARED_GONE = 3.0
#: A refusal within this many seconds after an event belongs to it.
SHARED_EPISODE_SECONDS = 2.0
#: If this many events in a row occur at the same limit (to within SHARED_SAME of a cut), nobody else uses the account:
#: the rate that other users leave would vary.
SHARED_ALIKE, SHARED_SAME = 4, 0.2
#: Refusals come at any pace if SHARED_OFTEN of them come within SHARED_OFTEN_CALLS calls, and this lasts for
#: SHARED_OFTEN_SECONDS. In that time, other users would have slowed down if a lower pace helped.
SHARED_OFTEN, SHARED_OFTEN_CALLS, SHARED_OFTEN_SECONDS = 7, 45, 30.0

# -- blackout --------------------------------------------------------------------------------------------

#: Assumed maximum length of a quota window in seconds, because most quotas are per minute.
BLACKOUT_WINDOW_SECONDS = 60.0
#: A blackout longer than this many seconds, and than this many times the wait before its last probe, is no penalty that
#: each refusal restarts.
BLACKOUT_MAX_PENALTY_SECONDS, BLACKOUT_MAX_PENALTY_STEPS = 10.0, 4.0
#: Two amounts are the same if they differ by at most this share or half a usual request, and the later one is at least
#: BLACKOUT_FEW usual requests.
BLACKOUT_SAME, BLACKOUT_FEW = 0.02, 6.0
#: A window may be longer or shorter by this share than the known bounds on its length.
BLACKOUT_FITS = 0.25
#: Minimum seconds until the next probe for the end of a window, as a share of the window's length.
BLACKOUT_MIN_LOOK = 0.02
#: If less than this share of the window's amount was accepted before a short blackout, the quota has no windows.
BLACKOUT_LESS = 0.6
#: A blackout is ignored if fewer than this many usual requests would have been sent in it, or if it is shorter than
#: this many seconds (the first probe ends it).
BLACKOUT_PAUSE, BLACKOUT_PAUSE_SECONDS = 3.0, 0.75

# -- learner ---------------------------------------------------------------------------------------------

#: A refusal before this share of a ramp's length came too early,
LEARNER_EARLY = 0.4
#: ... and before this share, it is unexplained if the bucket has credit: without other users, some credit would be
#: left.
LEARNER_SOON = 0.95
#: If a well-known limit turns out to be wrong by more than this share, and has not changed, the refusal is unexplained.
LEARNER_OFF = 0.05
#: A remembered limit grows by RAMP_RISE per second after this many seconds without a refusal.
LEARNER_REMEMBERED_SECONDS = 8.0
#: If the pace is above LEARNER_MAX_AHEAD times the sent rate of the last LEARNER_LATE_SECONDS seconds, something else
#: delays the requests.
LEARNER_MAX_AHEAD, LEARNER_LATE_SECONDS = 2.0, 1.5

# -- climb ------------------------------------------------------------------------------------------------

#: Natural logarithm of the factor between the pace of a block and the middle pace.
CLIMB_APART = 0.25
#: Minimum length of a block: this many calls, and this many times the time that a refusal takes.
CLIMB_CALLS, CLIMB_REFUSALS = 8, 2.0
#: The first calls of a block that do not count, because the previous block still affects them.
CLIMB_SETTLES = 2
#: The pace is what limits the calls if more than this share of what it allows was sent.
CLIMB_BINDS = 0.7
#: Weight of the earlier blocks after each pair of blocks.
CLIMB_KEPT = 0.8
#: Maximum change of the pace (natural logarithm) after a pair of blocks: until it first goes down, and afterwards.
CLIMB_FIRST_STEP, CLIMB_STEP = 0.5, 0.1
#: A policer refuses nothing below its limit. If at most this share of at least this many calls below the pace is
#: refused, the climb is not needed.
CLIMB_CLEAN_SHARE, CLIMB_CLEAN_CALLS = 0.04, 25.0
#: If a larger share of the calls below the pace is refused, other users are not the only cause: the pace goes down.
CLIMB_MAX_REFUSED = 0.6
#: Factor for the limit after more refusals in a row than chance explains.
CLIMB_IN_VAIN = 0.8

# -- history ----------------------------------------------------------------------------------------------

#: Width of a bin in seconds.
HISTORY_BIN_SECONDS = 0.05

# -- wordless --------------------------------------------------------------------------------------------

#: A failure can be a refusal without words only if it came in less than this share of the time of an answer.
WORDLESS_FAST = 0.2
#: Number of recent attempts with whose loads a failure is compared, and the smallest number that shows anything.
WORDLESS_RECENT, WORDLESS_MIN_KNOWN = 64, 4
#: One measure of the load is the time in which this many attempts were sent.
WORDLESS_SPAN = 8
#: Under a limit, the density of a failure's rank r among the loads is assumed to be (1 + SHAPE) x r^SHAPE.
WORDLESS_SHAPE = 3.0
#: The failures are refusals when the sum of the logarithms reaches this value: failures that do not depend on the load
#: reach it by chance once in about e^8 = 3,000 failures. One failure lowers the sum by at most the second value.
WORDLESS_SURE, WORDLESS_MAX_DROP = 8.0, 3.0
#: A request that fails again while this many others were answered and none failed is itself the cause.
WORDLESS_OTHERS = 4
#: Share of the requests that failed which must have been accepted later: a limit accepts all of them in the end.
WORDLESS_PASSED = 0.25
#: Seconds without a fast failure after which attempts are no longer recorded.
WORDLESS_SLEEP_SECONDS = 60.0
#: A request that fails more often than this is read as failed, unless half of WORDLESS_SURE speaks for a limit.
WORDLESS_UNKNOWN = 3
