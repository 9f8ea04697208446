-- Removes jobs of a node whose rows are written from its journal, and adds their counters to the unposted
-- sums of their functions. Only a job that the journal still held adds, so a second call, or a call of
-- another node, adds nothing. A job that ended as LOST is remembered: the first late result adds the
-- difference. A job that several nodes may send is remembered too, because a command of a process that has
-- died may enter it in the journal once more.
--
-- KEYS: the journal, its completeness marker, the unposted sums, the lost jobs, the shared jobs that have
-- counted. ARGV: the maximum number of lost jobs and of shared jobs, their expiry in seconds, and one line
-- per job: its id, its function, what it adds (errors, microseconds, runs with a handler time, handler
-- microseconds, cold starts), and a flag: 1 if it ended as LOST, plus 2 if it is shared. Answer: 0 if the
-- marker is gone, because Redis has lost its data (nothing is done then); 1 if every job added its amounts;
-- otherwise one digit per job: 1 if it did, 2 if it added the difference to LOST, 0 if it added nothing.
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
local sums, order, seen, added, all_added = {}, {}, {}, {}, true
local room, kept = nil, ARGV[2]

local function add(name, runs, errors, us, handled, handled_us, cold)
  local sum = sums[name]
  if not sum then
    sum = { 0, 0, 0, 0, 0, 0 }
    sums[name] = sum
    order[#order + 1] = name
  end
  sum[1], sum[2], sum[3] = sum[1] + runs, sum[2] + errors, sum[3] + us
  sum[4], sum[5], sum[6] = sum[4] + handled, sum[5] + handled_us, sum[6] + cold
end

-- All jobs in two commands: one command per job would dominate the cost.
local jobs, ids = {}, {}
for id, name, errors, us, handled, handled_us, cold, flag in
  string.gmatch(ARGV[3], '(%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d)\n')
do
  ids[#ids + 1] = id
  flag = tonumber(flag)
  jobs[#jobs + 1] = { name, errors, us, handled, handled_us, cold, flag % 2 == 1, flag >= 2 }
end
if not ids[1] then return 1 end
local held = redis.call('HMGET', KEYS[1], unpack(ids))
redis.call('HDEL', KEYS[1], unpack(ids))
local are_given_up = redis.call('EXISTS', KEYS[4]) == 1

-- Whether a shared job counts now for the first time.
local function is_first(id)
  if redis.call('HEXISTS', KEYS[5], id) == 1 then return false end
  if redis.call('HLEN', KEYS[5]) < tonumber(ARGV[1]) then
    redis.call('HSET', KEYS[5], id, '')
    redis.call('EXPIRE', KEYS[5], kept)
  end
  return true
end

for i, job in ipairs(jobs) do
  local id, name, errors, us, handled, handled_us, cold, is_lost, is_shared = ids[i], unpack(job)
  added[i] = '0'
  if held[i] and not seen[id] and (not is_shared or is_first(id)) then
    seen[id] = true
    added[i] = '1'
    add(name, 1, errors, us, handled, handled_us, cold)
    if is_lost then
      room = room or tonumber(ARGV[1]) - redis.call('HLEN', KEYS[4])
      if room > 0 then
        redis.call('HSET', KEYS[4], id, name)
        redis.call('EXPIRE', KEYS[4], kept)
        room, are_given_up = room - 1, true
      end
    end
  elseif not is_lost and are_given_up and redis.call('HDEL', KEYS[4], id) == 1 then
    -- LOST was counted as one run and one error before.
    added[i] = '2'
    add(name, 0, errors - 1, us, handled, handled_us, cold)
  end
  all_added = all_added and added[i] == '1'
end
local answer = all_added and 1 or table.concat(added)
if not order[1] then return answer end
local before, after = redis.call('HMGET', KEYS[3], unpack(order)), {}
for i, name in ipairs(order) do
  local sum, n = sums[name], 0
  for part in string.gmatch(before[i] or '', '-?%d+') do
    n = n + 1
    sum[n] = sum[n] + tonumber(part)
  end
  after[2 * i - 1] = name
  local text = string.format('%.0f:%.0f:%.0f:%.0f:%.0f', sum[1], sum[2], sum[3], sum[4], sum[5])
  -- Earlier versions, which may run beside this one during an update, cannot read a sixth number.
  if sum[6] ~= 0 then text = text .. string.format(':%.0f', sum[6]) end
  after[2 * i] = text
end
redis.call('HSET', KEYS[3], unpack(after))
return answer
