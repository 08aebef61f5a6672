"""Every constant of the learner, once: its name, its value and what it is."""

from __future__ import annotations

# -- start -----------------------------------------------------------------------------------------------

#: Until anything is known, this many requests go out unpaced: what all cameras send at once.
START_CREDIT = 16.0
#: A silent provider is a willing one: refusals come back quickly, so as much again follows after each of these seconds
START_CREDIT_STEP_SECONDS = 0.1
#: ... up to this many without an answer.
START_MAX_UNANSWERED = 64.0
#: Requests a second beyond that, growing by this share a second while they bind.
START_PACE, START_GROWTH = 16.0, 0.4
#: ... and never below this many times the accepted rate.
START_HEADROOM = 1.25
#: Seconds over which the accepted rate is measured.
START_WINDOW_SECONDS = 1.5

# -- first -----------------------------------------------------------------------------------------------

#: Requests a second that any provider is taken to allow when a first refusal at once says nothing else.
FIRST_FLOOR = 2.0
#: A bucket may be small and yet fill quickly: more is looked for from so many requests a second on.
FIRST_QUICK = 32.0
#: Seconds of the limit that a bucket is taken to hold when nothing is known of it.
FIRST_USUAL_BURST_SECONDS = 1.5
#: A first refusal within so many seconds shows a burst, and what came later a rate,
FIRST_SECONDS = 5.0
#: ... of which so much is taken to last.
FIRST_LASTING = 0.8
#: Growth of the guess while nothing contradicts it: a second, where refusals come back at once; how much less for each
#: second that they take; and from one request to the next at most.
FIRST_SEARCH, FIRST_SEARCH_CAUTION, FIRST_SEARCH_PER_REQUEST = 2.0, 5.0, 0.35

# -- estimate --------------------------------------------------------------------------------------------

#: How unsure a limit is, as a share of it, at least and at most.
ESTIMATE_SUREST, ESTIMATE_UNSUREST = 0.01, 0.3
#: What is less sure than that is vague: more may be allowed, whatever was spent.
ESTIMATE_VAGUE = 0.05
#: The least that a limit can be, in usual requests a second: one in an hour.
ESTIMATE_LEAST = 1 / 3600
#: Seconds of the limit that a bucket is taken to hold at most.
ESTIMATE_MAX_BURST_SECONDS = 6.0
#: How uncertain a limit that was learned before a restart is at least.
ESTIMATE_RECALLED = 0.1
#: What one event leaves of the limit at least.
ESTIMATE_LARGEST_CUT = 0.3
#: A limit that is another by this share has moved.
ESTIMATE_MOVED = 0.2

# -- policer ---------------------------------------------------------------------------------------------

#: Sends remembered at most: beyond this many since a refusal, the rate is known better than it will stay true.
POLICER_MAX_REMEMBERED = 1000

# -- ramp ------------------------------------------------------------------------------------------------

#: A ramp's length as a share of the calls that pay for one refusal.
RAMP, RAMP_NO_CREDIT = 1.0, 1.4
#: Beyond its length the credit of a bucket is spent at this share above the limit at least and at most: between them so
#: that no more than one further request goes out until the refusal is back.
RAMP_MIN_EXCESS, RAMP_MAX_EXCESS = 0.05, 0.1
#: No refusal means that the limit has risen when so many times the credit was spent; without credit, so far on the
#: ramp.
RAMP_SPENT, RAMP_RISEN_NO_CREDIT = 1.2, 1.15
#: Growth a second of a risen limit, where refusals come back at once,
RAMP_RISE = 0.35
#: ... at most by this share from one request to the next: at half a request a second, a second is no time,
RAMP_RISE_PER_REQUEST = 0.08
#: A ramp's length in seconds is held within these, since a limit may move: too slow for a small one is no use either.
RAMP_MIN_SECONDS, RAMP_MAX_SECONDS = 4.0, 160.0
#: Where each refusal begins a blackout, this share of the quota may be lost to probing, and a ramp may take so long.
RAMP_LOST_SHARE, RAMP_MAX_LOSING_SECONDS = 0.02, 600.0
#: Refusals to the end of a ramp that make the next one longer at most.
RAMP_MAX_EACH = 4.0
#: A limit that has just moved may move again: the ramp after that is so much shorter, and each one that follows longer.
RAMP_HASTE, RAMP_FIRST_HASTE, RAMP_HASTE_LEFT = 0.25, 0.35, 1.5

# -- fit -------------------------------------------------------------------------------------------------

#: So many refusals are to be explained, with no more than so many calls between any two of them.
FIT_REFUSALS, FIT_MAX_CALLS = 4, 60
#: Bounds that miss one another by this share meet, for clocks and ways are uneven.
FIT_MEET = 0.01
#: A burst of more than so many usual requests is not small.
FIT_SMALL = 4.0
#: What is tried, as multiples of the present burst: the nearest first.
FIT_TRIED = (1.25, 0.8, 1.6, 0.6, 2.0, 0.5, 2.5, 0.4, 3.2, 4.0, 6.0)

# -- early -----------------------------------------------------------------------------------------------

#: What one leaves of the limit, the first and the second time in an episode; the third time it is measured.
EARLY_CUTS = (0.985, 0.94)
#: How unsure that limit is.
EARLY_MEASURED = 0.15

# -- shared ----------------------------------------------------------------------------------------------

#: So many refusals that no limit of one's own explains mean that others use the account too. So many still count when a
#: lower limit has explained them: where more come, others are likelier than a limit that falls again.
SHARED_ODD, SHARED_KEPT = 5, 2
#: What a refusal takes off the limit: much at first, which evens the shares out, and less each time, which keeps them.
SHARED_MAX_CUT, SHARED_MIN_CUT, SHARED_SETTLE = 0.25, 0.1, 0.85
#: So soon after another one, a refusal tells that somebody has come: much again.
SHARED_CROWD_SECONDS = 5.0
#: Refusals a second for which growth makes up, whatever each takes off, at a share of so many requests a second. At a
#: larger one they are fewer by its root, up to that of so many: in requests, growth is less uneven than shares are.
SHARED_REFUSALS, SHARED_USUAL, SHARED_LARGE = 0.03, 5.0, 20.0
#: Growth from one request to the next at most.
SHARED_MAX_GROWTH = 0.02
#: Where so many were to be expected and none came, somebody has gone.
SHARED_GONE = 3.0
#: Refusals within so many seconds are one event: somebody looks for more than there is.
SHARED_EPISODE_SECONDS = 2.0
#: So many events in a row at the same limit, to within this share of a cut: it is ours alone, for what others leave
#: varies.
SHARED_ALIKE, SHARED_SAME = 4, 0.2
#: So many refusals within so many calls, and that for so many seconds, come at any pace: others who slow down too would
#: have done so by then.
SHARED_OFTEN, SHARED_OFTEN_CALLS, SHARED_OFTEN_SECONDS = 7, 45, 30.0

# -- blackout --------------------------------------------------------------------------------------------

#: A window that was used up is taken to be at most so long: quotas are told by the minute.
BLACKOUT_WINDOW_SECONDS = 60.0
#: A blackout longer than this, and than so many of the last wait, is no penalty that begins anew with each refusal.
BLACKOUT_MAX_PENALTY_SECONDS, BLACKOUT_MAX_PENALTY_STEPS = 10.0, 4.0
#: Amounts that differ by less than this share, or by less than a request, are the same, if of so many requests.
BLACKOUT_SAME, BLACKOUT_FEW = 0.02, 6.0
#: What took longer than a window by more than this share did not fill one.
BLACKOUT_FITS = 0.25
#: The end of a window is looked for at least so much later each time, as a share of it.
BLACKOUT_MIN_LOOK = 0.02
#: What held less than this share of a window was none.
BLACKOUT_LESS = 0.6
#: A blackout in which less than so many requests would have gone out, or that the first probe ends, is no blackout.
BLACKOUT_PAUSE, BLACKOUT_PAUSE_SECONDS = 3.0, 0.75

# -- controller ------------------------------------------------------------------------------------------

#: A refusal before this share of a ramp's length has come too early,
LEARNER_EARLY = 0.4
#: ... and before this one, where a bucket that is ours alone would have had credit left.
LEARNER_SOON = 0.95
#: A limit that was known well does not turn out to be off by more than this share, unless it has moved.
LEARNER_OFF = 0.05
#: A limit that was remembered, and at which nothing was refused for so many seconds, is raised by RAMP_RISE a second.
LEARNER_REMEMBERED_SECONDS = 8.0
#: A pace of more than so many times what goes out, of late, is not what holds requests back.
LEARNER_MAX_AHEAD, LEARNER_LATE_SECONDS = 2.0, 1.5

# -- climb ------------------------------------------------------------------------------------------------

#: How far above and below, as a logarithm.
CLIMB_APART = 0.25
#: A block is of so many calls at least, and lasts for so many times that of a refusal.
CLIMB_CALLS, CLIMB_REFUSALS = 8, 2.0
#: The first ones of a block meet what the block before has left.
CLIMB_SETTLES = 2
#: The pace is what holds calls back if it brings more than this share of what it allows.
CLIMB_BINDS = 0.7
#: What the past weighs after each pair of blocks.
CLIMB_KEPT = 0.8
#: How far the pace moves at most after a pair of blocks: before it went down for the first time, and then.
CLIMB_FIRST_STEP, CLIMB_STEP = 0.5, 0.1
#: A policer refuses nothing below its limit: then there is no need for this.
CLIMB_CLEAN_SHARE, CLIMB_CLEAN_CALLS = 0.04, 25.0
#: No more than this share is others' doing.
CLIMB_MAX_REFUSED = 0.6
#: What refusals in a row leave of the limit.
CLIMB_IN_VAIN = 0.8

# -- history ----------------------------------------------------------------------------------------------

#: Width of a bin in seconds.
HISTORY_BIN_SECONDS = 0.05
