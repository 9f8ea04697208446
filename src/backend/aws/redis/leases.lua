-- One bucket whose tokens are leased to nodes. A call reports what a holder still has, returns tokens that it
-- does not need, takes tokens that are spent immediately, and leases more.
--
-- The hash has a field `b` = "at:debt:cost" and for each holder "amount:expiry:seq:taken", times in Unix
-- microseconds. `debt` counts all tokens taken and not drained yet, live leases included. A request adds
-- `cost`; each microsecond drains `rate`. Debt never drains below the live leases, so the tokens left plus
-- the tokens leased never exceed the burst. Therefore the admissions in any window never exceed burst + rate
-- * window, even if nodes or calls are lost. An expired lease counts as spent. All values stay below 2^53,
-- where Lua's doubles are exact.
--
-- A repeated call gets the answer of the first one. A call that is older than the holder's last one changes
-- nothing.
--
-- KEYS: the bucket. ARGV: holder, seq (0: store no lease), held, back, need, want (tokens), rate, cost,
-- burst, lease in microseconds, and the time if it is not that of Redis. Answer: applied, amount leased,
-- taken, left, microseconds until one token is available, nodes.
local key, holder = KEYS[1], ARGV[1]
local number = {}
for i = 2, #ARGV do number[i] = tonumber(ARGV[i]) end
local seq, held, back, need, want = number[2], number[3], number[4], number[5], number[6]
local rate, cost, burst, ttl, clock = number[7], number[8], number[9], number[10], number[11]
if not clock then
  local time = redis.call('TIME')
  clock = time[1] * 1000000 + time[2]
end
local capacity = cost * burst

-- Whole quotient; a - a % b is exact where a / b might be rounded up.
local function quotient(a, b) return (a - a % b) / b end

local at, debt, live, mine, others, gone = clock, 0, 0, nil, {}, {}
local stored = redis.call('HGETALL', key)
for i = 1, #stored, 2 do
  local field, value = stored[i], stored[i + 1]
  if field == 'b' then
    local then_at, then_debt, then_cost = string.match(value, '^(%d+):(%d+):(%d+)$')
    at, debt = tonumber(then_at), tonumber(then_debt)
    -- The quota has changed: the number of requests owed is kept, rounded up.
    if tonumber(then_cost) ~= cost then debt = math.ceil(debt / tonumber(then_cost) * cost) + 1 end
  else
    local amount, expiry, its_seq, taken = string.match(value, '^(%d+):(%d+):(%d+):(%d+)$')
    local lease = {
      field = field, amount = tonumber(amount), expiry = tonumber(expiry),
      seq = tonumber(its_seq), taken = tonumber(taken),
    }
    live = live + lease.amount
    others[#others + 1] = lease
  end
end
debt = math.max(live * cost, math.min(debt, capacity))

-- Drains up to now. Leases expire on the way, in order of their expiry; until then they hold the debt up.
table.sort(others, function(a, b) return a.expiry < b.expiry end)
local now = math.max(clock, at) -- after a step back nothing drains until the clock has caught up
local function drain(till)
  if till > at then
    debt = math.max(live * cost, debt - (till - at) * rate)
    at = till
  end
end
while others[1] and others[1].expiry <= now do
  local lease = table.remove(others, 1)
  drain(lease.expiry)
  live = live - lease.amount
  gone[#gone + 1] = lease.field
end
drain(now)
for i, lease in ipairs(others) do
  if lease.field == holder then mine = table.remove(others, i) break end
end
local nodes = #others + 1

-- The tokens that a later request would find, and the time until one token is available.
local function answer(applied, amount, taken)
  local left = debt < capacity and quotient(capacity - debt, cost) or 0
  local retry = 0
  if left < 1 then
    retry = at - clock + math.ceil((debt + cost - capacity) / rate)
    -- Nothing drains below the live leases.
    if (live + 1) * cost > capacity and others[1] then retry = math.max(retry, others[1].expiry - clock) end
  end
  return { applied, amount, taken, left, retry, nodes }
end

if mine and seq == mine.seq then return answer(1, mine.amount, mine.taken) end
if mine and seq < mine.seq then return answer(0, 0, 0) end

-- A holder without a live lease holds nothing, whatever it reports.
local had = mine and mine.amount or 0
held = math.min(held, had)
back = math.min(back, had - held)
live = live - had + held
debt = math.max(live * cost, debt - back * cost)

local room = debt < capacity and quotient(capacity - debt, cost) or 0
local taken = math.min(need, room)
local extra = math.min(want, quotient(room - taken, 2 * nodes))
live = live + extra
debt = debt + (taken + extra) * cost
-- A rejection changes nothing, so nothing is written: the stored value drains to the same result. It is
-- written if the holder still holds tokens, because the holder relies on the new expiry.
if taken + extra + back + held + had == 0 then return answer(1, 0, 0) end

-- '%.0f', because tostring() prints only 14 digits.
local fields = { 'b', string.format('%.0f:%.0f:%.0f', at, debt, cost) }
if seq > 0 then
  fields[3] = holder
  fields[4] = string.format('%.0f:%.0f:%.0f:%.0f', held + extra, at + ttl, seq, taken)
end
if gone[1] then redis.call('HDEL', key, unpack(gone)) end
redis.call('HSET', key, unpack(fields))
-- Expires when nothing is owed: leased tokens begin to drain when the lease ends.
local full_us = at - clock + ttl + debt / rate
redis.call('PEXPIRE', key, string.format('%.0f', math.ceil(full_us / 1000) + 1))
return answer(1, held + extra, taken)
