"""What the codes and words of providers mean, as tables. To teach a new refusal, add one line here and one test.

The reader is `refusals.py`; it says in which order the tables are used. The comment of a line names its source.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from backends.base import ThrottleKind

#: What an answer can mean. `too_large`: this request alone is larger than a limit. `own_fault`: another fault of the
#: request, so that the words of the message prove nothing. `server`: the provider failed.
Meaning = ThrottleKind | Literal[
    "quota_period", "billing", "unauthorized", "moderated", "too_large", "own_fault", "rejected", "server"
]  # fmt: skip

#: Statuses at which a message is about the request's fields, so that it may quote them.
ABOUT_THE_REQUEST = (400, 404, 405, 409, 413, 415, 422)


def plain(code: str) -> str:
    """Return a code in the spelling of the table: `Limit_Requests` and `LimitRequests` are the same code."""
    return "".join(character for character in code.lower() if character.isalnum() or character == ".")


#: Codes (and types) whose meaning is clear without the message. A code with dots, such as
#: `InternalError.Algo.DataInspectionFailed`, is also looked up by its last part.
_CODES: tuple[tuple[str, Meaning], ...] = (
    # DashScope: Model Studio's page "Error messages"
    ("Throttling.RateQuota", "request_rate"),
    ("LimitRequests", "request_rate"),
    ("Throttling.AllocationQuota", "token_rate"),
    ("insufficient_quota", "token_rate"),  # OpenAI means money by it: see `refusals._about_money`
    ("Throttling.BurstRate", "growth"),
    ("limit_burst_rate", "growth"),
    ("Throttling.Concurrency", "concurrency"),
    ("ModelServingError", "capacity"),
    ("ModelUnavailable", "capacity"),
    ("Arrearage", "billing"),
    ("CommodityNotPurchased", "billing"),
    ("PrepaidBillOverdue", "billing"),
    ("PostpaidBillOverdue", "billing"),
    ("AllocationQuota.FreeTierOnly", "billing"),
    ("DataInspectionFailed", "moderated"),
    ("RequestTimeOut", "server"),
    ("InvalidParameter", "own_fault"),
    ("invalid_parameter_error", "own_fault"),
    ("InvalidURL", "own_fault"),
    ("DownloadError", "own_fault"),
    # OpenAI: guide "Error codes", and its clients' issues
    ("requests", "request_rate"),  # the `type` beside `rate_limit_exceeded`
    ("tokens", "token_rate"),
    ("input-images", "request_rate"),
    ("billing_hard_limit_reached", "billing"),
    ("billing_not_active", "billing"),
    ("account_deactivated", "billing"),
    ("invalid_api_key", "unauthorized"),
    ("content_filter", "moderated"),
    ("content_policy_violation", "moderated"),
    ("context_length_exceeded", "too_large"),
    ("string_above_max_length", "own_fault"),
    ("invalid_image_url", "own_fault"),
    ("invalid_base64", "own_fault"),
    ("invalid_value", "own_fault"),
    ("resource_unavailable", "capacity"),  # flex processing
    ("slow_down", "growth"),
    # Azure
    ("NoCapacity", "capacity"),
    ("ResponsibleAIPolicyViolation", "moderated"),
    ("tokens_limit_reached", "too_large"),  # GitHub Models
    # Anthropic
    ("overloaded_error", "capacity"),
    ("request_too_large", "too_large"),
    ("authentication_error", "unauthorized"),
    # Google: ErrorInfo.reason
    ("API_KEY_INVALID", "unauthorized"),
    ("API_KEY_EXPIRED", "unauthorized"),
    ("BILLING_DISABLED", "billing"),
    # Volcengine Ark
    ("AccountOverdueError", "billing"),
    ("SetLimitExceeded", "billing"),
    ("RequestBurstTooFast", "growth"),
    ("InflightBatchsizeExceeded", "concurrency"),
    ("ServerOverloaded", "capacity"),
    # Moonshot Kimi
    ("exceeded_current_quota_error", "billing"),
    ("engine_overloaded_error", "capacity"),
    # Others, by name
    ("credit_limit", "billing"),  # Together
    ("dynamic_request_limited", "growth"),  # Together
    ("capacity_exceeded", "capacity"),  # Groq
    ("budget_exceeded", "billing"),  # LiteLLM
    ("terminal_quota_exhausted", "billing"),  # LiteLLM, by hermes-agent PR#106427
    ("insufficient_user_quota", "billing"),  # new-api
    ("EXCEED_TOKEN_QUOTA_LIMIT", "billing"),  # Tencent CloudBase
    ("openrouter_in_flight_budget", "concurrency"),
    ("overloaded", "capacity"),  # TGI
)  # fmt: skip
CODES: dict[str, Meaning] = {plain(code): meaning for code, meaning in _CODES}
#: The same codes as the providers spell them.
CODE_SPELLINGS = tuple(code for code, _ in _CODES)

#: Codes that are numbers, by the name of their field (`base_resp`: MiniMax; `text`: a number in parentheses inside a
#: message). Numbers of the field `code` are unique enough to be used for every provider.
NUMBERS: dict[str, dict[int, Meaning]] = {
    "base_resp": {
        1002: "request_rate", 1004: "unauthorized", 1008: "billing", 1024: "server", 1026: "moderated",
        1027: "moderated", 1033: "server", 1039: "token_rate", 1041: "concurrency", 2013: "own_fault",
        2049: "unauthorized", 2056: "quota_period",
    },  # MiniMax: page "Error codes"
    "error_code": {4: "capacity", 17: "quota_period", 18: "request_rate", 19: "billing", 110: "unauthorized"},  # Baidu v1
    "text": {
        1002: "request_rate", 1008: "billing", 1039: "token_rate", 1041: "concurrency", 2056: "quota_period",  # MiniMax
        11202: "request_rate", 11203: "concurrency", 11201: "quota_period",  # Spark
    },
    "code": {
        1008: "billing", 1039: "token_rate", 1026: "moderated",  # MiniMax
        1113: "billing", 1309: "billing", 1311: "billing",  # Zhipu, Z.ai: page "Error codes"
        1261: "too_large", 1301: "moderated", 1302: "concurrency", 1303: "request_rate", 1304: "quota_period",
        1305: "capacity", 1308: "quota_period", 1310: "quota_period",
        30001: "billing", 50505: "capacity", 50508: "capacity", 50603: "capacity",  # SiliconFlow
        11201: "quota_period", 11202: "request_rate", 11203: "concurrency", 10013: "moderated", 10014: "moderated",
        336501: "request_rate", 336502: "token_rate", 336503: "token_rate",  # Spark above, Baidu Qianfan here
        3036: "quota_period", 4006: "quota_period", 3040: "capacity",  # Cloudflare Workers AI
    },
}  # fmt: skip


class Words(NamedTuple):
    """One line of a table of patterns. The patterns are matched with text in lower case."""

    meaning: Meaning
    pattern: re.Pattern[str]


def _words(*lines: tuple[Meaning, str]) -> tuple[Words, ...]:
    return tuple(Words(meaning, re.compile(pattern)) for meaning, pattern in lines)


#: Words inside codes. `ModelAccountTpmRateLimitExceeded` is matched as "model account tpm rate limit exceeded". A caller
#: cannot write a code, so these count at every status, except where `refusals.py` says otherwise.
CODE_WORDS = _words(
    ("billing", r"\barrears?\b|arrearage|\bbudget exceeded|(bill|account|payment|invoice) (is )?overdue|payment required|unpaid (bill|invoice)"
                r"|(insufficient|out of|not enough|no) (account )?(balance|funds?|credits?|user quota|wallet)|credits? (exhausted|depleted)"
                r"|balance (is )?(not enough|insufficient|exhausted|depleted|too low)"
                r"|billing (not active|disabled|hard limit|limit|required)"
                r"|resource pack|charge resource|free (trial|tier|quota)|not purchased|unpurchased|account suspended|spend(ing)? limit"),
    ("moderated", r"content (filter|policy)|data inspection|(?<!case )(?<!in)sensitive|moderation|responsible ai|risk control"),
    ("too_large", r"(request|prompt|input|payload|context|body)( length)? (is )?too (large|long)|context (length|window)"),
    ("unauthorized", r"(invalid|incorrect|wrong|missing|expired|bad) (api ?key|access (key|token)|credential)"
                     r"|api ?key (invalid|expired|disabled|not)|\bunauthori[sz]ed\b|\bunauthenticated\b"
                     r"|authentication|\bauth (failed|error)"),
    ("quota_period", r"\b(per|by) (day|week|month|hour)\b|\b(daily|weekly|monthly|hourly)\b|\b(rpd|tpd|rph|tph)\b"),
    ("concurrency", r"concurren(t|cy)|\bin ?flight\b|simultaneous|\bparallel\b|back ?pressure"
                    r"|queue (is )?(full|exceeded|size|overflow)|pending requests"),
    ("growth", r"\bburst\b|too fast|\bsurge\b|slow ?down|ramp up"),
    ("token_rate", r"\b(i|o)?tp[ms]\b|\btokens? (rate|per|quota|usage|limit)|too many tokens"),
    ("request_rate", r"\b(rp[ms]|qp[ms]|ip[ms])\b|\brequests? (rate|per|frequency)|too frequent"),
    ("capacity", r"overload|\bbusy\b|\bno capacity\b|capacity|model (unavailable|not ready|loading)|insufficient resource"),
)  # fmt: skip
#: Words that also name fields of a request (`unsupported_white_balance`): only at `WEAK_STATUSES` and inside a 200.
WEAK_CODE_WORDS = _words(
    ("billing", r"\boverdue\b|\bunpaid\b|\bbalance\b|\bbilling\b|\bpayment\b|\bsuspended\b"),
    ("unauthorized", r"(invalid|incorrect|wrong|missing|expired|bad) token"),
)
WEAK_STATUSES: dict[Meaning, tuple[int, ...]] = {"billing": (402, 403, 412, 429), "unauthorized": (401, 403)}
#: Codes that say only that some limit was exceeded.
THROTTLING_CODE = re.compile(
    r"throttl|rate limit|too many request|slow ?down|request limit|limit exceeded|resource exhausted|quota (exceeded|exhausted)"
)
#: The part of them that counts at status 400, where the others can mean a fault of the request.
SURE_THROTTLING_CODE = re.compile(r"throttl|rate limit|too many request")

#: This request alone is larger than a limit. Also `Requested N > Limit M`, read as numbers.
TOO_LARGE = re.compile(
    r"(request|prompt|input|message|payload)( body)? (is )?too (large|long)|must be reduced"
    r"|reduce (your|the) (message|prompt|input|context|max tokens|(length|number|size) of (the |your )?(messages|prompt|input|tokens))"
    r"|maximum context length"
    r"|exceeds? the (maximum|max) (number of tokens|context|input|request|prompt)"
    r"|(请求|输入|上下文)(内容)?(过大|过长|长度超)"
)
#: The part of it that counts beside a limit: other advice to send less is given for a limit that passes, too.
SURELY_TOO_LARGE = re.compile(r"(request|prompt|input|message|payload)( body)? (is )?too (large|long)|must be reduced")
SURELY_TOO_LARGE_CODES = ("requesttoolarge", "contextlengthexceeded")
#: The limit passes, so that the same request is accepted later.
PASSES = re.compile(r"\brate[ -]limit|try (it )?again|\bwait\b|retry (after|in|later)|稍后|重试")

#: A budget that returns as soon as requests end. It is looked for before money.
BEFORE_MONEY = re.compile(r"\bin-?flight\b.{0,30}(budget|spend|limit)")
#: Lack of money. Only at the statuses 400, 402, 403, 412, 429 and inside a 200, and never in the caller's words.
MONEY = _words(
    ("billing", r"(insufficient|not enough|no) (account |remaining |available )?(balance|funds?|credits?)\b"),
    ("billing", r"balance (is )?(insufficient|too low|not enough|exhausted|depleted)|credit balance"),
    ("billing", r"(account|your|available|remaining|current) balance (is |of )?[$€¥]?\s?0(\.0+)?(?![\d.,]*\d)"),
    ("billing", r"(out of|used (up )?all (of )?(your |the )?(available )?|exceeded .{0,20}(included )?) ?credits?\b"),
    ("billing", r"credits? (are |is |have been |has been |were )?(depleted|exhausted|expired|used up)|(add|purchase|buy) (more )?credits?"),
    ("billing", r"(spend(ing)?|credit|billing|budget|payment)( hard)? (limit|cap|budget)s?( has been| is| was)? (exceeded|reached|hit)"),
    ("billing", r"reach(ed|ing) (its|the|your) (monthly )?(spend(ing)?|billing|budget)|(billing|spending) hard limit|key limit exceeded"),
    ("billing", r"over (its |the |your )?budget|budget (has been )?exceeded|exceededbudget|usage limits?\. you will regain"),
    ("billing", r"(account|consumer|project|organi[sz]ation|workspace|subscription)\b.{0,60}(is |has been |was )(suspended|not active|inactive|deactivated|overdue|in arrears|frozen)"),
    ("billing", r"overdue (balance|payment|bill|invoice)|bill is overdue|past invoices|in arrears|account is in good standing"),
    ("billing", r"payment (is )?required|enter a payment|requires? billing|billing (to be |is )?(not )?enabled|enable billing"),
    ("billing", r"has not (been )?purchased|not (been )?purchased yet|(plan|subscription|package) (has |is )?expired"),
    ("billing", r"(user|token|account) quota is not enough|pre-?consume.{0,20}quota.{0,20}fail|please (recharge|top.?up)|extra usage is required"),
    ("billing", r"(monthly|api) usage limit"),  # Mistral; Anthropic's "specified API usage limits"
    ("billing", r"余额(不足|已用尽|为零|耗尽)|欠费|请?(先)?充值|(套餐|资源包|体验包)[^。]{0,8}(到期|过期|用完|用尽|耗尽|不足)|未(开通|购买)"
                r"|(用户|账户|账号|令牌|剩余)额度(不足|已用[尽完])|预扣费额度失败|账单逾期|逾期未付"),
)  # fmt: skip
#: "Check your plan and billing details": OpenAI means money, Google writes it beside every limit.
WEAK_MONEY = re.compile(r"billing details")
#: A free quota that does not come back: the account has to buy the model. With words of `PERIOD` it comes back.
FREE_QUOTA = re.compile(
    r"free (allocated )?(trial )?quota (has been |is )?(exceeded|exhausted)|exhausted its free"
    r"|free (trial|tier)\b.{0,40}(exhausted|expired|used up)|免费额度.{0,6}(用尽|用完|耗尽|不足)"
    r"|(额度|配额)(不足|(已|已经)?(用尽|用完|耗尽))"
)
#: A limit as 403 or inside a 200, by words.
THROTTLED = re.compile(r"\bthrottled\b|flow control|rate limit|too many requests|限流|流控")
#: A quota as 403: waiting for seconds does not help, as it does after a rate limit.
QUOTA_403 = re.compile(
    r"(?<!rate )(quota|allowance|usage limit|allotment)s?\b.{0,40}(exceeded|exhausted|used up|reached|depleted)"
    r"|exceeded (your|the|its) .{0,20}(quota|allowance)"
)

#: The sidecar's key. Only at 400 and 403: a 401 needs no words.
KEY = _words(
    ("unauthorized", r"(invalid|incorrect|wrong|no|missing|expired|unknown) (api|access|secret)[ -]?(key|token)"),
    ("unauthorized", r"(api|access)[ -]?key (is |was |has been )?(reported|blocked|not valid|invalid|expired|disabled|revoked|not found|incorrect|missing)"),
    ("unauthorized", r"(令牌|密钥|api ?key|token)[^。]{0,4}(无效|不正确|错误|已?过期|不可用|失效)|无效的(令牌|密钥|api ?key)|身份(验证|认证)失败"),
)  # fmt: skip

#: The provider's content inspection. Only the outcome's label depends on it.
MODERATED = re.compile(
    r"inappropriate content|data ?inspection ?failed|content management policy|flagged|requires moderation"
    r"|safety system|敏感|违规|不安全"
)

_PERIOD_ZH = r"(今日|今天|当日|当天|本日|每日|每天|单日|本周|每周|本月|每月|当月|每小时|\d{1,4} ?(个)?小时)"
#: A quota of an hour or longer is used up.
PERIOD = _words(
    ("quota_period", r"\bper[ _-]?(day|week|month|hour)\b|/ ?(day|hour|week|month)\b|\b(rpd|tpd|rph|tph)\b|\bby (day|month)\b"),
    ("quota_period", r"\b(daily|weekly|monthly|hourly)\b.{0,40}(limit|quota|allocation|allowance|allotment|cap\b|usage|requests?|tokens?|credits?)"),
    ("quota_period", r"(limit|quota|allowance|reset|usage)s?.{0,20}\b(daily|weekly|monthly|hourly)\b|today'?s? (quota|limit|usage|allowance)|\b(this|current) (month|week|billing (period|cycle))\b"),
    ("quota_period", r"(try|come back|available) (it )?(again )?tomorrow|(call|request) volume quota|\d{1,4}[ -]hours? (usage )?(limit|quota|window)"),
    ("quota_period", rf"{_PERIOD_ZH}[^。]{{0,24}}(上限|限额|额度|次数|限制|配额|用完|用尽|耗尽|超出|超过|流控)|日流控|明[天日]再试"),
)  # fmt: skip
#: Words that do not count behind a short window (see `NAMED_SHORT_WINDOW`): there they are a hint.
LASTING = frozenset(line.pattern for line in (*MONEY, *PERIOD)) | {WEAK_MONEY, FREE_QUOTA}
#: "50 per 86400s": the window in seconds.
WINDOW_SECONDS = re.compile(r"\bper (\d{4,8}) ?s(ec|econds?)?\b")

#: Too many requests at the same time. It is looked for before `CAPACITY`. It must not match `java.util.concurrent`.
CONCURRENCY = re.compile(
    r"(?<![.\w])concurren(t|cy|ts)\b|\bparallel request|\bin-?flight\b|simultaneous|back ?pressure|too many (running|connections|open connections)"
    r"|\b(total|active|running|outstanding) requests? limit"
    r"|queue (is )?full|queue (size|length|limit)|maximum queue|pending requests? exceeded|num queued requests"
    r"|reset reason: overflow|并发"
)
GROWTH = re.compile(
    r"(increas|grow|ris|ramp)\w* too (quick|fast|rapid)|ramp up|\b(traffic|request) (surge|burst|spike)|\bsurge\b|burst rate|usage increase rate|(scale|ramp)\w* .{0,40}gradually"
    r"|增长过快|突增|激增"
)
#: The provider has no room, whatever this account sends.
CAPACITY = re.compile(
    r"over ?load|too busy|\b(server|service|system|model|engine)s? (is |are )?(currently |too |temporarily )?busy|\bbusy\b"
    r"|no (available )?slots?|slots? (is |are )?(un|not )available|(is |currently |still )?loading( the)? model"
    r"|model .{0,80}(is )?(currently |still )?loading|at capacity|(out of|no|insufficient|limited) capacity"
    r"|capacity (limit|exceeded|constraint)|(high|heavy) (demand|traffic|load)|no (available )?(instances?|deployments?|workers?) available"
    r"|no available (instance|deployment|worker)|rate-?limited upstream|temporarily rate-limited|model is unavailable|not ready for serving"
    r"|饱和|访问量过大|(系统|服务|服务器|模型)(当前)?(繁忙|忙)|过载|负载(过高|较高)|资源(紧张|不足)|算力不足|高峰"
)
TOKENS = re.compile(
    r"tokens?[ -]?(rate|per(?! (request|prompt|image|message))|limit|quota)|tokens? .{0,20}(per|/|a) ?(min|sec|m\b|s\b)|\b[io]?tp[ms]\b|too many tokens|tokens? count"
    r"|allocated quota exceeded|每分钟.{0,6}token|token.{0,8}(限制|超限|超出|上限|额度)"
)
REQUESTS = re.compile(
    r"(requests?|calls?|queries|images?|api|invocations?)[ -](rate|per(?! (request|prompt|image|message|batch))|limit)|(requests?|calls?|queries) .{0,30}\b(per|/|a) ?(min|sec|m\b|s\b)"
    r"|\b[rqi]p[ms]\b|exceeded your (request limit|current requests)|local rate limited|number of requests"
    r"|(请求|调用|访问)(频率|速率)|频率(过高|限制|超)|过于频繁|限频|每分钟请求|每秒请求"
)
#: A short window without the word tokens.
SHORT_WINDOW = re.compile(r"\bper[ _-]?(min|sec)|/ ?(min|sec)|\bqps\b|每分钟|每秒")
#: A short window, also beside the word tokens.
NAMED_SHORT_WINDOW = re.compile(
    r"\bper[ _-]?(min(ute)?|sec(ond)?)s?\b|/ ?(min(ute)?|sec(ond)?)s?\b|\bqps\b|\b[rt]p[ms]\b|\bper \d{1,3} ?s(ec|econds?)?\b"
    r"|每分钟|每秒"
)
